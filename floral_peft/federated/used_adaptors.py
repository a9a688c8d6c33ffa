"""The adaptors that a client uses: local steps are made with these alone, as if the model had no others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.federated.forward import Forward
from floral_peft.federated.workplace import Workplace
from floral_peft.tuner import buffer_roles, parameter_roles, private_buffers


#: torch's optimisers that move each number by its own gradients: what else is in its tensor does not count.
ELEMENTWISE = frozenset("sgd adam adamw adagrad adadelta adamax nadam radam rmsprop rprop".split())
#: What a step of one more group of clients costs on a CPU, in adaptors of clients.
GROUP_COST = 32


class AdaptorAxes:
    """The parameters and statistics with a slice per adaptor, where slices may be left out of local steps.

    That is where local steps leave the router alone: an adaptor whose weight is 0 keeps it and gets no gradient, so
    that the rest comes out the same without it, up to rounding. (Weight decay alone would still move it, to no avail:
    such a client does not count in its mean.) All take part where something else may count: the router's noise, a
    method's own forward, an optimiser that looks at whole tensors, or parts of adaptors that are frozen, private or
    shared. A hook in the model that looks at other adaptors finds them gone.

    Args:
        place: The model and what belongs to it.
    """

    def __init__(self, place: Workplace) -> None:
        model, groups = place.model, place.groups
        roles = parameter_roles(model)
        kinds = {**roles, **buffer_roles(model)}
        adaptors = {name for name, role in kinds.items() if role.kind == "adaptor"}
        axes = {name: cluster.axis for name, cluster in groups.clustered.items() if cluster.adaptor is None}
        plain = type(place.forward) is Forward and place.args.optimizer.lower() in ELEMENTWISE
        sliced = adaptors == axes.keys() == groups.clustered.keys() and axes.keys().isdisjoint(groups.anchors)
        self._model: Any = model
        self._routers = {name: -1 for name, role in roles.items() if role.kind == "router"}
        self._axes = {**axes, **self._routers} if axes and plain and sliced and not private_buffers(model) else {}

    def among(self, trainable: Collection[str]) -> Mapping[str, int]:
        """Tensor → its axis of length C, routers included; empty where nothing may be left out.

        Args:
            trainable: The parameters that local steps train.
        """
        if not self._axes or not self._routers.keys().isdisjoint(trainable):
            return {}
        router = self._model.router
        return {} if any(router.settings[name].noise for name in router.active_adapters) else self._axes


def used_adaptors(mixtures: Tensor) -> Tensor | None:
    """Which adaptors clients use, as numbers, (clients, m) for the m that one of them uses at most.

    A client that uses fewer has others beside them, whose weights are 0.

    Args:
        mixtures: Each client's π, (clients, ..., C).

    Returns:
        The numbers, int64, each client's different ones; None if one of them uses all.
    """
    used = _used(mixtures)
    most = int(used.sum(dim=-1).max())
    if most == used.shape[-1]:
        return None
    return used.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :most]


def _used(mixtures: Tensor) -> Tensor:
    """Whether each client uses each adaptor, in any layer: (clients, C)."""
    return mixtures.reshape(len(mixtures), -1, mixtures.shape[-1]).ne(0).any(dim=1)


def grouped_by_use(mixtures: Tensor) -> list[list[int]]:
    """Clients in groups to be trained side by side, each with as many adaptors as one of the group uses at most.

    The more groups the fewer adaptors are trained that nobody uses, but the more steps are made: of all groupings by
    the number of adaptors used, this one has the least Σ (clients · adaptors + GROUP_COST).

    Args:
        mixtures: Each client's π, (clients, ..., C).

    Returns:
        The clients' numbers, ascending within a group; groups that use fewer adaptors come first.
    """
    counts = _used(mixtures).sum(dim=-1).tolist()
    widths = sorted(set(counts))
    clients = [counts.count(width) for width in widths]
    # The cheapest grouping of the narrowest i widths: its cost, and where its last group begins.
    cheapest: list[tuple[int, int]] = [(0, 0)]
    for end, width in enumerate(widths, start=1):
        costs = [(cheapest[start][0] + sum(clients[start:end]) * width + GROUP_COST, start) for start in range(end)]
        cheapest.append(min(costs))
    groups: list[list[int]] = []
    end = len(widths)
    while end:
        start = cheapest[end][1]
        groups.append([k for k, count in enumerate(counts) if widths[start] <= count <= widths[end - 1]])
        end = start
    return groups[::-1]


@dataclass(frozen=True)
class UsedSlices:
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
    def of(cls, axes: Mapping[str, int], mixtures: Tensor) -> UsedSlices | None:
        """The slices of some clients; None if one of them uses all."""
        numbers = used_adaptors(mixtures)
        return None if numbers is None else cls(axes, numbers, mixtures)

    def for_each(self, name: str, tensor: Tensor) -> Tensor:
        """Every client's slices of a tensor that all have in common, (clients, ...), in new memory."""
        axis = self.axes[name] % tensor.dim()
        slices = tensor.index_select(axis, self.numbers.flatten().to(tensor.device))
        return slices.unflatten(axis, self.numbers.shape).movedim(axis, 0).contiguous()

    def for_client(self, name: str, tensor: Tensor, client: int) -> Tensor:
        """One client's slices of a tensor."""
        return tensor.index_select(self.axes[name], self.numbers[client].to(tensor.device))

    def scattered(self, name: str, slices: Tensor, like: Tensor) -> Tensor:
        """Every client's slices, (clients, ...), in tensors with the shape of `like`, which are 0 elsewhere."""
        axis, clients = self.axes[name] % like.dim(), len(self.numbers)
        whole = slices.new_zeros(clients, *like.shape)
        numbers = self.numbers.to(slices.device)
        rows = torch.arange(clients, device=slices.device).unsqueeze(1)
        whole.movedim(axis + 1, 1)[rows, numbers] = slices.movedim(axis + 1, 1)
        return whole


@contextmanager
def narrowed(model: nn.Module, axes: Mapping[str, int], mixture: Tensor) -> Iterator[None]:
    """Within, a model has only those adaptors that one client uses; afterwards all, and these as they were left.

    Args:
        model: The model. Its parameters and buffers stay the same objects.
        axes: Of those with slices: see [`AdaptorAxes`].
        mixture: The client's π, (..., C).
    """
    numbers = used_adaptors(mixture.unsqueeze(0))
    if numbers is None:
        yield
        return
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole = {name: held[name].data for name in axes}
    chosen = {name: numbers[0].to(value.device) for name, value in whole.items()}
    used = {name: value.index_select(axes[name], chosen[name]) for name, value in whole.items()}
    try:
        for name, slices in used.items():
            held[name].data = slices
        yield
    finally:
        for name, slices in used.items():
            held[name].data = whole[name].index_copy_(axes[name], chosen[name], slices)
