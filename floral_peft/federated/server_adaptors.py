"""The server's state when adaptors go, or get a lower rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from floral_peft.federated.groups import tensors_of
from floral_peft.federated.server import ServerState


def without_adaptors(server: ServerState, kept: Sequence[int], axes: Mapping[str, int]) -> ServerState:
    """The server's state with some adaptors only.

    Args:
        server: The state.
        kept: Their present numbers.
        axes: The axis of length C of each clustered tensor.
    """

    def select(name: str, value: Any) -> Any:
        # An optimiser's memories have their parameter's shape, or are counters.
        if name not in axes or not isinstance(value, torch.Tensor) or value.shape != server.tensors[name].shape:
            return value
        return value.index_select(axes[name], torch.tensor(kept, device=value.device))

    return ServerState(
        round=server.round,
        tensors={name: select(name, value) for name, value in server.tensors.items()},
        optimizer={
            name: {key: select(name, value) for key, value in memory.items()}
            for name, memory in server.optimizer.items()
        },
        routing=server.routing,
        adaptors=tuple(server.adaptors[number] for number in kept),
        wide=server.wide,
    )


def after_compression(server: ServerState, model: torch.nn.Module) -> ServerState:
    """The server's state once the model that holds it has been compressed.

    What has not changed keeps the server's precision; optimisers' memories of what has another shape are gone.

    Args:
        server: The state before.
        model: The model.
    """
    held = tensors_of(model)
    tensors = {}
    for name, old in server.tensors.items():
        new = held[name]
        same = new.shape == old.shape and torch.equal(new, old.to(new.dtype))
        tensors[name] = old if same else new.to(old.dtype, copy=True)
    shaped = {name for name, old in server.tensors.items() if tensors[name].shape == old.shape}
    memory = {name: entries for name, entries in server.optimizer.items() if name in shaped}
    return replace(server, tensors=tensors, optimizer=memory, wide=False)
