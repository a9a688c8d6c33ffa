"""One client's local training: the server's tensors and its own go in, an update and its own come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from floral_peft.federated.aggregation import ClientUpdate, UpdateError
from floral_peft.federated.batches import Batch, Examples
from floral_peft.federated.local_steps import Pull, local_batches, norms_frozen, optimizer_groups, training_phases
from floral_peft.federated.norms import resting_norms
from floral_peft.federated.plain_sgd import PlainSGD
from floral_peft.federated.seeding import ClientId, derive_seed, seed_generators
from floral_peft.federated.server import PrivateState, ServerState
from floral_peft.federated.used_adaptors import AdaptorAxes, narrowed
from floral_peft.federated.workplace import Workplace
from floral_peft.tuner import base_weights, clip_steps, factor_pairs, precondition_gradients


# A client makes few steps: a loss scale that starts at PyTorch's 2¹⁶ would lose the first of them to overflows.
_INITIAL_LOSS_SCALE = 2.0**10


class LocalTraining:
    """Trains clients on one model, one after the other: their part of a FLoRAL round (arXiv:2410.03497).

    Args:
        place: The model and what belongs to it.
    """

    def __init__(self, place: Workplace) -> None:
        self._model: Any = place.model
        self._visitor = place.visitor
        self._forward = place.forward
        self._groups = place.groups
        self._place = place
        self._accelerator = place.accelerator
        self._norms = [module for module in place.model.modules() if isinstance(module, _BatchNorm)]
        self._resting = list(resting_norms(place.model).values())
        self._axes = AdaptorAxes(place)

    def __call__(
        self, client_id: ClientId, dataset: Dataset | Examples, private: PrivateState, state: ServerState
    ) -> tuple[ClientUpdate, PrivateState]:
        """Train one client for one round.

        Its result depends on these arguments, the run's seed and nothing else: not on the clients before it.

        Args:
            client_id: The client.
            dataset: Its training examples; those that have been read already are taken as they are.
            private: Its private tensors.
            state: The server's state.

        Returns:
            What the client sends, and its new private tensors, which it keeps.

        Raises:
            UpdateError: The client has no training examples.
        """
        if len(dataset) == 0:
            raise UpdateError(f"client {client_id!r} has no training examples")
        round = state.round + 1
        # Dropout, a router's noise and the dataset's transform draw from the global generators.
        seed_generators(derive_seed(self._place.args.seed, "train", round, client_id), self._accelerator.device)
        order = torch.Generator().manual_seed(derive_seed(self._place.args.seed, "shuffle", round, client_id))
        self._visitor.load(private, state)
        self._model.train()
        for norm in self._resting:
            norm.eval()
        examples = self._place.examples(dataset)
        constants = self._forward.constants(examples) if self._place.args.label_prior else {}
        parameters = dict(self._model.named_parameters())
        trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
        axes = self._axes.among(trainable)
        with narrowed(self._model, axes, self._model.mixture()) if axes else nullcontext():
            # The last phase's loss is that of the model that is sent.
            for phase in training_phases(trainable, self._groups, self._place.args.alternating):
                with _only_training(parameters, phase):
                    moving = {name: parameters[name] for name in phase}
                    loss = self._run_steps(moving, examples, constants, order, state)
        deltas, trained = self._visitor.result(state)
        update = ClientUpdate(
            client_id=client_id,
            round=round,
            num_examples=len(dataset),
            usage=self._usage(len(dataset)),
            deltas=deltas,
            train_loss=loss,
        )
        return update, trained

    def _run_steps(
        self,
        parameters: dict[str, nn.Parameter],
        examples: Examples,
        constants: Batch,
        order: torch.Generator,
        state: ServerState,
    ) -> float:
        """Train parameters for the local epochs or steps. Returns the mean loss of an example."""
        args, accelerator = self._place.args, self._accelerator
        groups = optimizer_groups(parameters, self._groups, args)
        plain = args.optimizer.lower() == "sgd" and not args.optimizer_kwargs and not args.fp16
        optimizer: Any = PlainSGD(groups) if plain else args.build_optimizer(groups)
        scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=_INITIAL_LOSS_SCALE) if args.fp16 else None
        longest, longest_adaptor = args.step_norms
        factors = factor_pairs(self._model) if args.precondition or longest_adaptor else []
        weights = base_weights(self._model) if longest else []
        pull = Pull(parameters, self._groups.anchors, state.tensors, args.proximal_weight)
        pulled = [parameters[name] for name in pull.names]
        total = torch.zeros((), device=accelerator.device)
        seen = 0
        for size, batch in examples.batches(local_batches(len(examples), args, order)):
            with norms_frozen(self._norms, size == 1), self._precision():
                loss = self._forward({**batch, **constants}).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            if pulled:
                pull([_gradient(parameter) for parameter in pulled], pulled)
            if factors and args.precondition:
                precondition_gradients(factors, epsilon=args.precondition_epsilon, max_norm=longest_adaptor or None)
            elif longest_adaptor:
                clip_steps(factors, longest_adaptor)
            if longest:
                clip_steps([], longest, weights)
            if args.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters.values(), args.max_grad_norm)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            for parameter in parameters.values():
                parameter.grad = None
            total.add_(loss.detach(), alpha=size)
            seen += size
        return float(total) / seen

    def _precision(self) -> AbstractContextManager[None]:
        mixed = self._place.args.bf16 or self._place.args.fp16
        return self._accelerator.autocast() if mixed else nullcontext()

    def _usage(self, num_examples: int) -> Tensor | None:
        """π̂ᵏ_c Nᵏ, shape (L, C)."""
        if not self._groups.clustered:
            return None
        mixture = self._model.mixture()
        return mixture.double().cpu().reshape(-1, mixture.shape[-1]) * num_examples


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient; zero where the batch did not use it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@contextmanager
def _only_training(parameters: Mapping[str, nn.Parameter], names: list[str]) -> Iterator[None]:
    """Let only some parameters ask for gradients; whatever happens, no gradient is left behind."""
    chosen = set(names)
    stopped = [parameter for name, parameter in parameters.items() if parameter.requires_grad and name not in chosen]
    for parameter in stopped:
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.grad = None  # what somebody else has left there
    try:
        yield
    finally:
        for parameter in stopped:
            parameter.requires_grad_(True)
        for parameter in parameters.values():
            parameter.grad = None
