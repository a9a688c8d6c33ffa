"""One model as many: some of its tensors stacked over clients, the others shared by all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from floral_peft.federated.batches import Batch
from floral_peft.federated.draws import ClientDraws
from floral_peft.federated.forward import Forward
from floral_peft.federated.stacked_optimizer import Chosen
from floral_peft.tuner import Substitute


Stack = dict[str, Tensor]
"""Name in the model → one tensor per client, (clients, ...)."""


class StackedModel:
    """Runs a model for several clients at once, each with its own tensors.

    Args:
        model: The model.
        forward: Calls it on a batch.
        accelerator: Autocast.
        tensors: Those of its parameters and buffers that differ between clients. They are changed in place.
    """

    def __init__(self, model: nn.Module, forward: Forward, accelerator: Accelerator, tensors: Stack) -> None:
        self._within = Substitute(model)
        self._model: Any = model
        self._forward = forward
        self._accelerator = accelerator
        self.tensors = tensors

    def gradients(
        self, names: Sequence[str], chosen: Chosen, batch: Batch, generators: Sequence[torch.Generator]
    ) -> tuple[Stack, Tensor]:
        """Gradients of some clients' losses. Running statistics move, as in any forward pass.

        Args:
            names: The parameters that are asked for.
            chosen: The clients.
            batch: Their batches, (clients, examples, ...).
            generators: Their random generators.

        Returns:
            Parameter → its gradient (clients, ...), and the mean loss of each client's batch, (clients,).
        """
        part = {name: tensor[chosen] for name, tensor in self.tensors.items()}
        wanted = {name: part[name] for name in names}
        others = {name: tensor for name, tensor in part.items() if name not in wanted}
        clients = torch.zeros(len(generators), device=next(iter(batch.values())).device)

        def loss(wanted: Stack, others: Stack, batch: Batch, client: Tensor) -> Tensor:
            with ClientDraws(client, generators):
                value: Tensor = self._within({**wanted, **others}, lambda: self._forward(batch).loss)
                return value

        with self._accelerator.autocast():
            gradients, losses = vmap(grad_and_value(loss))(wanted, others, batch, clients)
        if isinstance(chosen, Tensor):
            for name in others:
                self.tensors[name][chosen] = others[name]
        return _owned(gradients), losses.detach()

    @torch.no_grad()
    def mixtures(self) -> Tensor:
        """Every client's π, (clients, C), or (clients, L, C) with a router per layer."""
        return vmap(lambda tensors: self._within(tensors, self._model.mixture))(self.tensors)


def _owned(gradients: Stack) -> Stack:
    """Gradients that may be changed in place, each by itself.

    Of a term that adds up a weight, all entries may be one number in memory; of parameters that are added to one
    another, or put together, the gradients may be the same memory, where a batch has one example.
    """
    holders = Counter(value.untyped_storage().data_ptr() for value in gradients.values())
    return {
        name: value.clone(memory_format=torch.contiguous_format)
        if 0 in value.stride() or holders[value.untyped_storage().data_ptr()] > 1
        else value
        for name, value in gradients.items()
    }
