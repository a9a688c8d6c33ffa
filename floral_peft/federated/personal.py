"""Clients that took no part in training: their routers, from a few of their examples."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from floral_peft.federated.adaptors import Adaptors
from floral_peft.federated.aggregation import UpdateError
from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.arrivals import Arrivals
from floral_peft.federated.batches import Batch
from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.forward import LABELS
from floral_peft.federated.routers import Routers
from floral_peft.federated.routing import Posterior
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.turn import Arrival, Turn
from floral_peft.federated.workplace import Workplace
from floral_peft.tuner import prediction_doubt


class Personalizing:
    """Mixin of a trainer: `personalize`."""

    model: Any
    args: FederatedArguments
    dataset: FederatedDataset
    _routers: Routers | None
    _arrivals: Arrivals
    _place: Workplace
    _adaptors: Adaptors
    _round: int

    if TYPE_CHECKING:

        def _visit(self) -> AbstractContextManager[None]: ...

    def personalize(self, data: Any, client: ClientId = "new client") -> Any:
        """Find the routers of clients that took no part in training, from a few of their examples, by the posterior.

        C numbers a client are found, by C forward passes over its examples (`model.fit_router` says what they are);
        nothing trains. Afterwards `model.client(client)` knows it. Nothing is written to `output_dir`.

        Args:
            data: A new client's examples: a `Dataset`, a `DatasetDict` with a split "train", or a list of
                dictionaries; or a dictionary of such, for several clients. Without labels, classifiers choose the
                adaptors that are surest of their predictions: that works where inputs differ, not where labels do.
            client: The client's id, where it is one.

        Returns:
            The client's mixture, (C,); for several clients a dictionary of them.

        Raises:
            ValueError: The model has no routers; a client is known already, has no examples, its losses are not
                finite, or the model cannot be run on its examples: the first of several such; the others have their
                routers then.
            TypeError: The examples are anything else.
        """
        if self._routers is None:
            raise ValueError("the model has no FLORAL adaptors, so there is no router to find.")
        chosen = new_clients(data, client, self.dataset)
        arrival = self._arrivals.arrival or Posterior(self.args).arrival()
        found: dict[ClientId, Tensor] = {}
        failure: Exception | None = None
        with self._visit():
            start = {**self._adaptors.untrained, self._routers.name: torch.zeros(1, *self._routers.shape)}
            for name, examples in chosen.items():
                turn = Turn(self._place, self._routers, name, examples, start, self._round)
                try:
                    found[name] = personal_router(turn, arrival)
                except UpdateError as error:  # which names the client
                    failure = failure or error
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    told = ValueError(f"client {name!r}: the model cannot be run on its examples: {reason}")
                    told.__cause__ = error
                    failure = failure or told
        if found:
            self._routers.install(list(found), found)
        if failure is not None:
            raise failure
        mixtures = {name: self.model.mixture(name) for name in found}
        return mixtures if isinstance(data, Mapping) and not isinstance(data, DatasetDict) else mixtures[client]


def new_clients(data: Any, client: ClientId, known: Container[ClientId]) -> dict[ClientId, Dataset]:
    """The examples of each new client.

    Args:
        data: One client's: a `Dataset`, a `DatasetDict` with a split "train", or a list of examples (dictionaries). Or
            a dictionary of such by client.
        client: The client, where they are one's.
        known: The clients that are no new ones.

    Raises:
        TypeError: They are anything else, such as a batch.
        ValueError: A client has no examples, or is known already.
    """
    several = isinstance(data, Mapping) and not isinstance(data, DatasetDict)
    found = {name: _dataset(name, held) for name, held in (data if several else {client: data}).items()}
    for name, examples in found.items():
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise TypeError(f"a client's id is a string or an int, got {name!r}.")
        if name in known:
            raise ValueError(f"client {name!r} is one of the trainer's; give a new one another name.")
        if len(examples) == 0:
            raise ValueError(f"client {name!r} has no examples: there is nothing to fit a router to.")
    return found


def personal_router(turn: Turn, arrival: Arrival) -> Tensor:
    """A new client's router, (1, L, C).

    Args:
        turn: The client's turn, with a uniform router.
        arrival: Finds the router from examples with labels.
    """
    if turn.has(LABELS):
        found: Tensor = arrival(turn).private[turn.routers.name]
        return found

    def doubt(batch: Batch) -> Tensor:
        outputs = turn.forward.outputs(batch)
        return prediction_doubt(outputs["logits"] if isinstance(outputs, Mapping) else outputs)

    doubts = turn.num_examples * turn.finite(turn.pure_means(doubt))
    logits = turn.routers.less(turn.private[turn.routers.name], doubts)
    return logits - logits.amax(dim=-1, keepdim=True)


def _dataset(client: Any, data: Any) -> Dataset:
    if isinstance(data, DatasetDict):
        if "train" not in data:
            raise ValueError(f'client {client!r}: its DatasetDict has the splits {list(data)}, but no "train".')
        return data["train"]
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Sequence) and all(isinstance(example, Mapping) for example in data):
        return Dataset.from_list([{name: _plain(value) for name, value in example.items()} for example in data])
    raise TypeError(
        f"client {client!r}: examples are a Dataset, a DatasetDict or a list of dictionaries, got "
        f"{type(data).__name__}. (A dictionary is of clients, each with its examples.)"
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value
