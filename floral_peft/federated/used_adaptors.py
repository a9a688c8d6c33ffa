"""The adaptors that a client uses: local steps are made with these alone, as if the model had no others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from floral_peft.federated.groups import ParameterGroups
from floral_peft.tuner import private_buffers


class AdaptorAxes:
    """The parameters with a slice per adaptor, where slices may be left out of local steps.

    That is where local steps leave the router alone: an adaptor whose weight is 0 keeps it and gets no gradient, so
    that all else comes out the same, up to rounding, without it. Nothing may be left out where adaptors have something
    of their own that no gradient moves, nor in an ensemble, whose parameters belong to one of its models each.

    Args:
        model: The model.
        groups: Which of its tensors are shared, clustered, private.
    """

    def __init__(self, model: nn.Module, groups: ParameterGroups) -> None:
        axes = {name: cluster.axis for name, cluster in groups.clustered.items() if cluster.adaptor is None}
        self._routers = {name: -1 for name, role in groups.roles.items() if role.kind == "router"}
        sliced = axes.keys() == groups.clustered.keys() and axes.keys().isdisjoint(groups.anchors)
        self._axes = {**axes, **self._routers} if axes and sliced and not private_buffers(model) else {}

    def among(self, trainable: Collection[str]) -> Mapping[str, int]:
        """Parameter → its axis of length C, routers included; empty where nothing may be left out.

        Args:
            trainable: The parameters that local steps train.
        """
        return self._axes if self._routers.keys().isdisjoint(trainable) else {}


def used_adaptors(mixtures: Tensor) -> Tensor | None:
    """Which adaptors clients use, as numbers, (clients, m) for the m that one of them uses at most.

    A client that uses fewer has others beside them, whose weights are 0.

    Args:
        mixtures: Each client's π, (clients, ..., C).

    Returns:
        The numbers, int64, each client's different ones; None if one of them uses all.
    """
    used = mixtures.reshape(len(mixtures), -1, mixtures.shape[-1]).ne(0).any(dim=1)
    most = int(used.sum(dim=-1).max())
    if most == used.shape[-1]:
        return None
    return used.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :most]


@dataclass(frozen=True)
class Parts:
    """The slices that clients use, each its own, of the tensors with a slice per adaptor.

    Args:
        axes: Tensor → its axis of length C: see [`AdaptorAxes`].
        numbers: The slices, int64, (clients, m).
        mixtures: Each client's π over all adaptors, (clients, ..., C).
    """

    axes: Mapping[str, int]
    numbers: Tensor
    mixtures: Tensor

    @classmethod
    def of(cls, axes: Mapping[str, int], mixtures: Tensor) -> Parts | None:
        """The parts for some clients; None if one of them uses all."""
        numbers = used_adaptors(mixtures)
        return None if numbers is None else cls(axes, numbers, mixtures)

    def of_each(self, name: str, tensor: Tensor) -> Tensor:
        """Each client's part of a tensor that all have in common, (clients, ...), in new memory."""
        axis = self.axes[name] % tensor.dim()
        return tensor.movedim(axis, 0)[self.numbers.to(tensor.device)].movedim(1, axis + 1).contiguous()

    def of_one(self, name: str, tensor: Tensor, row: int) -> Tensor:
        """One client's part of a tensor."""
        return tensor.index_select(self.axes[name], self.numbers[row].to(tensor.device))

    def whole(self, name: str, part: Tensor, row: int, like: Tensor) -> Tensor:
        """One client's part among all slices, the others of which are 0; `like` has their shape."""
        return part.new_zeros(like.shape).index_copy_(self.axes[name], self.numbers[row].to(part.device), part)


@contextmanager
def narrowed(parameters: Mapping[str, nn.Parameter], axes: Mapping[str, int], mixture: Tensor) -> Iterator[None]:
    """Within, a model has only those adaptors that one client uses; afterwards all, and these as they were left.

    Args:
        parameters: The model's parameters, which stay the same objects.
        axes: Of those with slices: see [`AdaptorAxes`].
        mixture: The client's π, (..., C).
    """
    numbers = used_adaptors(mixture.unsqueeze(0))
    if numbers is None:
        yield
        return
    whole = {name: parameters[name].data for name in axes}
    chosen = {name: numbers[0].to(value.device) for name, value in whole.items()}
    for name, axis in axes.items():
        parameters[name].data = whole[name].index_select(axis, chosen[name])
    try:
        yield
    finally:
        for name, axis in axes.items():
            whole[name].index_copy_(axis, chosen[name], parameters[name].data)
            parameters[name].data = whole[name]
