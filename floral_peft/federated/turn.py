"""A client's turn with the model outside its local steps: what a method may do before it trains or is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from floral_peft.federated.aggregation import UpdateError
from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.batches import RESIDENT_BYTES, Batch, Examples, ordered_batches
from floral_peft.federated.client import LocalTraining
from floral_peft.federated.evidence import Piece, mean_losses
from floral_peft.federated.forward import LABELS, as_cross_entropy
from floral_peft.federated.rounds import Outcome
from floral_peft.federated.routers import Routers
from floral_peft.federated.seeding import ClientId, derive_seed, seed_generators
from floral_peft.federated.server import PrivateState, ServerState
from floral_peft.federated.workplace import Workplace


class EvidenceError(UpdateError):
    """A client's losses under the adaptors say nothing; the message names the client."""


class Turn:
    """One client's turn with the model.

    Args:
        place: The model and what belongs to it.
        routers: The model's routers, if it has any.
        client_id: The client.
        dataset: Its training examples.
        private: Its private tensors.
        round: The rounds done.
        state: The server's state, in training; None in evaluation, where the model holds it already.
        resident: Training examples of up to this many bytes are held in memory as a whole.
        lot: What has been drawn for the client: clients that train for the first time have numbers that follow one
            another, in random order.

    Attributes:
        memory: What the server remembers of the routers, in training.
        client_id: The client.
        dataset: Its training examples.
        real_labels: How many numbers a label has, where labels are real numbers rather than classes or tokens; known
            once there are losses.
    """

    def __init__(
        self,
        place: Workplace,
        routers: Routers | None,
        client_id: ClientId,
        dataset: Dataset,
        private: PrivateState,
        round: int,
        state: ServerState | None = None,
        resident: int = RESIDENT_BYTES,
        lot: int = 0,
    ) -> None:
        self._place = place
        self._routers = routers
        self.client_id = client_id
        self.dataset = dataset
        self._state = state
        self.round = round
        self.lot = lot
        self.memory: Mapping[str, Tensor] = {} if state is None else state.routing
        self.real_labels: int | None = None
        self.private = private
        self.num_examples = len(dataset)
        self._foreseen: list[Tensor] = []
        self._resident = resident

    @property
    def args(self) -> FederatedArguments:
        """The run's settings."""
        return self._place.args

    @property
    def forward(self) -> Any:
        """Calls the model on a batch: what the method's own `forward` returned."""
        return self._place.forward

    @property
    def routers(self) -> Routers:
        """The model's routers.

        Raises:
            ValueError: It has none.
        """
        if self._routers is None:
            raise ValueError("the model has no router.")
        return self._routers

    @property
    def training(self) -> bool:
        """Whether the client is to train, or to be evaluated."""
        return self._state is not None

    def with_logits(self, logits: Tensor) -> PrivateState:
        """The client's private tensors, but with another router.

        Args:
            logits: Shape (1, L, C).
        """
        return {**self.private, self.routers.name: logits}

    @torch.no_grad()
    def total(self, function: Callable[[Batch, int], Tensor]) -> Tensor:
        """The sum of a function over batches of the client's training examples, at least one, in order.

        Meanwhile the model holds the client's and the server's tensors, in evaluation mode.

        Args:
            function: (batch, its number of examples) → a tensor.
        """
        with self._place.accelerator.autocast():
            return torch.stack([function(batch, count) for count, batch in self._batches()]).sum(dim=0)

    def pure_losses(self) -> Tensor:
        """f_c, the mean loss of a training example where adaptor c is used alone, float32, shape (C,).

        Raises:
            EvidenceError: They are not finite.
        """
        return self.finite(self.pure_means(self._loss))

    def finite(self, losses: Tensor) -> Tensor:
        """The client's losses under each adaptor, as they are: infinite ones only beside one that is not.

        Args:
            losses: Or what else says how likely each adaptor is, (C,).

        Raises:
            EvidenceError: They are not finite.
        """
        values = losses.flatten().tolist()
        if any(map(math.isnan, values)) or not any(map(math.isfinite, values)):
            raise EvidenceError(
                f"client {self.client_id!r}: its losses under the adaptors are not finite: an example holds values "
                "that are not, or none has a label, or training diverged (a lower learning_rate, or max_grad_norm)"
            )
        return losses

    def pure_losses_of(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The same for parts of the client's training examples, none of them empty.

        Args:
            parts: The rows of each, int64.
        """
        return self._foreseen or look_together([[(self, self.pieces(parts))]])[0]

    def foresee(self, losses: list[Tensor]) -> None:
        """What `pure_losses_of` will say, where that is known already.

        Args:
            losses: Of each part that will be asked for.
        """
        self._foreseen = losses

    def pure_means(self, function: Callable[[Batch], Tensor]) -> Tensor:
        """The mean over training examples of a function that runs the model, for each adaptor alone, float32, (C,).

        Args:
            function: Batch → its mean over the batch, a scalar.
        """
        counts, batches = zip(*self._batches(), strict=True)
        with self._place.accelerator.autocast():
            means = self.routers.pure_models.losses(function, batches)
        weighted = [mean.float() * count for mean, count in zip(means, counts, strict=True)]
        return torch.stack(weighted).sum(dim=0).cpu() / self.num_examples

    @torch.no_grad()
    def losses_at(self, temperatures: Tensor, rows: Tensor, logits: Tensor) -> Tensor | None:
        """The mean cross entropy of some training examples where the model's outputs are divided by temperatures.

        Args:
            temperatures: Shape (T,).
            rows: The examples, int64, at least one.
            logits: The router, (1, L, C).

        Returns:
            float64 on the CPU, (T,); None where the model's loss is not the cross entropy of its outputs, or these are
            not finite (no label counts).
        """
        self._place.visitor.load(self.with_logits(logits), self._state)
        self._place.model.eval()
        found = torch.zeros(len(temperatures), dtype=torch.float64)
        for some in rows.split(self.args.per_device_eval_batch_size):
            with self._place.accelerator.autocast():
                outputs = as_cross_entropy(self.forward(self._examples()[0].batch(some)))
            if outputs is None:
                return None
            predicted, labels = outputs
            for number, temperature in enumerate(temperatures.tolist()):
                loss = nn.functional.cross_entropy(predicted.float() / temperature, labels)
                found[number] += float(loss) * len(some) / len(rows)
        return found if bool(found.isfinite().all()) else None

    def _loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self.forward(batch).loss
        return loss

    def _note_labels(self, batch: Batch) -> None:
        labels = batch.get(LABELS)
        if isinstance(labels, Tensor) and labels.is_floating_point():
            self.real_labels = labels[0].numel()

    def has(self, column: str) -> bool:
        """Whether batches of the client's examples have a column."""
        return column in next(self._batches())[1]

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """The client's training examples in order, for a model that holds the client's tensors: sizes and batches."""
        self._enter()
        examples, constants = self._examples()
        batches = examples.batches(ordered_batches(len(examples), self.args.per_device_eval_batch_size))
        return ((count, {**batch, **constants}) for count, batch in batches)

    @cached_property
    def examples(self) -> Examples:
        """The client's training examples, ready to be cut into batches."""
        return self._place.examples(self.dataset, self._resident)

    def hold(self, resident: int) -> None:
        """Training examples of up to this many bytes are held in memory as a whole from now on."""
        if resident > self._resident and "examples" in vars(self) and not self.examples.resident:
            del self.examples  # to be read again
        self._resident = resident

    def _enter(self) -> None:
        """Have the model hold the client's tensors, in evaluation mode."""
        self._place.visitor.load(self.private, self._state)
        self._place.model.eval()

    def _examples(self) -> tuple[Examples, Batch]:
        """The client's training examples, and what batches hold beside them."""
        place, args = self._place, self._place.args
        device = place.accelerator.device
        # A dataset's transform may draw from the global generators.
        seed_generators(derive_seed(args.seed, "relearn", self.round, self.client_id), device)
        return self.examples, place.forward.constants(self.examples)

    def pieces(self, parts: Sequence[Tensor]) -> list[Piece]:
        """Parts of the client's training examples, in pieces of a batch at most.

        Args:
            parts: The rows of each, int64; none of them empty.
        """
        examples, constants = self._examples()
        found = [
            Piece(number, len(rows) / len(part), len(rows), {**examples.batch(rows), **constants})
            for number, part in enumerate(parts)
            for rows in part.split(self.args.per_device_eval_batch_size)
        ]
        if found:
            self._note_labels(found[0].batch)
        return found

    @contextmanager
    def trained(self, epochs: int) -> Iterator[None]:
        """Within, the model is the client's after local training as in a round; afterwards it is as it was.

        The model must hold the client's and the server's tensors. A client without examples stays as it is.

        Args:
            epochs: For how long, in place of a round's.
        """
        place = replace(self._place, args=replace(self.args, local_epochs=epochs, local_steps=None))
        before = ServerState.of(place.model, place.groups)
        try:
            if self.num_examples:
                LocalTraining(place)(self.client_id, self.dataset, self.private, before)
            yield
        finally:
            place.visitor.load(self.private, before)


def look_together(groups: Sequence[Sequence[tuple[Turn, Sequence[Piece]]]]) -> list[list[Tensor]]:
    """The pure losses of parts of several clients' training examples.

    Of several clients only the routers may differ in the model.

    Args:
        groups: Clients, at least one, each with its pieces: see `Turn.pieces`. Those of a group share passes.

    Returns:
        For each client, in order, what `Turn.pure_losses_of` says of its parts: the same bits whatever other groups
        there are, the same up to rounding whoever else is in its group (unless the model draws in evaluation).
    """
    first = groups[0][0][0]
    first._enter()
    pieces = [[own for _, own in group] for group in groups]
    with torch.no_grad(), first._place.accelerator.autocast():
        return mean_losses(first.routers.pure_models, first.forward, pieces, first.args.per_device_eval_batch_size)


@dataclass(frozen=True)
class Arrived:
    """What a client has found on arrival.

    Args:
        private: The private tensors with which it trains, or is evaluated.
        kept: Those of them that it keeps in place of what it trained with.
        sums: What it tells the server for its sums over the cohort, float64 on the CPU: see [`RouterUpdate.sums`].
        trains_on: Those of its examples that it trains on, if it has looked at them; None: all.
    """

    private: PrivateState
    kept: PrivateState = field(default_factory=dict)
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    trains_on: Examples | None = None


def with_arrival(outcome: Outcome, arrived: Arrived | None) -> Outcome:
    """What came of a client's training, with what it had found on arrival."""
    if isinstance(outcome, Exception) or arrived is None:
        return outcome
    update, private = outcome
    return replace(update, sums=arrived.sums), {**private, **arrived.kept}


#: What a client does before it trains and before it is evaluated: finds its private tensors.
Arrival = Callable[[Turn], Arrived]


def relearn(turn: Turn) -> Arrived:
    """Find a router anew, for clients that keep nothing: π̂_c ∝ π_c exp(−η f_c).

    This is one step of exponentiated gradient, where f_c is the loss of the pure model in which every layer uses
    adaptor c alone, π the mixture with which the client starts, and η the router's learning rate. Without examples
    the router stays the one to start with.
    """
    if not turn.num_examples:
        return Arrived(turn.private)
    args, routers = turn.args, turn.routers
    rate = args.learning_rate if args.router_learning_rate is None else args.router_learning_rate
    return Arrived(turn.with_logits(routers.less(turn.private[routers.name], rate * turn.pure_losses())))
