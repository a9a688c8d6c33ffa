"""What a client sends, the checks on it, and the weighted means of a round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from floral_peft.federated.exact import ExactSum
from floral_peft.federated.groups import Clustered, ParameterGroups
from floral_peft.federated.processes import Processes
from floral_peft.federated.seeding import ClientId


#: An adaptor is unused when the cohort gives it less than this share of its examples; it keeps its value then.
LEAST_USAGE = 1e-6
#: A delta of this magnitude times its examples or more is refused: in `ExactSum` it could reach float64's end.
_MOST = 2.0**900


class UpdateError(ValueError):
    """A client's update that must not be averaged; the message names the client, the tensor and what was expected."""


@dataclass(frozen=True)
class ClientUpdate:
    """All that leaves a client in a round. Nothing private is in it: no router, no tensor outside the allow-list.

    Args:
        client_id: Who sends it.
        round: The round for which it was trained, from 1.
        num_examples: Nᵏ, the client's training examples.
        usage: π̂ᵏ_c Nᵏ in float64 on the CPU, shape (L, C): the examples that each adaptor stands for, by each of the
            router's L rows. None where nothing is clustered.
        deltas: New − old of each public tensor.
        train_loss: Mean loss of an example while training.
        sums: What the router's update adds up over the cohort, float64 on the CPU: see [`RouterUpdate.sums`].
    """

    client_id: ClientId
    round: int
    num_examples: int
    usage: Tensor | None
    deltas: Mapping[str, Tensor]
    train_loss: float
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def peaks(self) -> dict[str, float]:
        """The largest magnitude in each delta, NaN if it holds one."""
        return _peaks(self.deltas)

    @cached_property
    def told(self) -> Tensor:
        """All sums in one vector, by name."""
        nothing = torch.zeros(0, dtype=torch.float64)
        return torch.cat([nothing, *(self.sums[name].flatten() for name in sorted(self.sums))])

    @cached_property
    def told_peak(self) -> float:
        """The largest magnitude in it, NaN if it holds one."""
        return _peaks({"": self.told})[""]


@dataclass(frozen=True)
class Aggregate:
    """A cohort's weighted means.

    Args:
        deltas: Mean of new − old of each public tensor, float64.
        usage: p(c), the mean of π̂ᵏ_c under p(k), shape (L, C). None where nothing is clustered.
        sums: The sums of the clients' `sums`.
        truncation: The largest relative error of an adaptor whose mean was cut to its rank; None where none was.
    """

    deltas: dict[str, Tensor]
    usage: Tensor | None
    sums: dict[str, Tensor] = field(default_factory=dict)
    truncation: float | None = None

    def used(self) -> Tensor | None:
        """Which adaptors have users in the cohort, bool (L, C)."""
        return None if self.usage is None else self.usage > LEAST_USAGE


def _peaks(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude in each tensor, NaN if it holds one. One pass, and one wait for the device."""
    filled = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not filled:
        return dict.fromkeys(tensors, 0.0)
    ends = torch.stack([end for tensor in filled.values() for end in torch.aminmax(tensor)]).tolist()
    found = {name: max(-low, high) for name, low, high in zip(filled, ends[::2], ends[1::2], strict=True)}
    return dict.fromkeys(tensors, 0.0) | found


def check_update(
    update: ClientUpdate,
    client_id: ClientId,
    round: int,
    reference: Mapping[str, Tensor],
    routers: torch.Size | None,
    sums: Mapping[str, torch.Size] | None = None,
) -> None:
    """Check an update before any arithmetic.

    Args:
        update: The update.
        client_id: The client from which it came.
        round: The round that is being aggregated.
        reference: The server's public tensors, which say the names and shapes.
        routers: The shape (L, C) that `usage` must have; None where nothing is clustered.
        sums: The names and shapes that `sums` must have.

    Raises:
        UpdateError: Something is wrong with it.
    """
    who = f"client {client_id!r}"
    if update.client_id != client_id:
        raise UpdateError(f"{who}: the update is of client {update.client_id!r}")
    if update.round != round:
        raise UpdateError(f"{who}: the update is for round {update.round}, expected {round}")
    if isinstance(update.num_examples, bool) or not isinstance(update.num_examples, int) or update.num_examples <= 0:
        raise UpdateError(f"{who}: num_examples is {update.num_examples!r}, expected an int above 0")
    if update.deltas.keys() != reference.keys():
        extra, missing = (
            sorted(update.deltas.keys() - reference.keys()),
            sorted(reference.keys() - update.deltas.keys()),
        )
        raise UpdateError(f"{who}: unexpected tensors {extra}, missing tensors {missing}")
    for name, delta in update.deltas.items():
        if not isinstance(delta, Tensor) or delta.shape != reference[name].shape:
            found = tuple(delta.shape) if isinstance(delta, Tensor) else type(delta).__name__
            raise UpdateError(f"{who}: {name} has shape {found}, expected {tuple(reference[name].shape)}")
        if delta.dtype != reference[name].dtype:
            raise UpdateError(f"{who}: {name} is {delta.dtype}, expected {reference[name].dtype}")
    for name, peak in update.peaks.items():
        if not peak < _MOST / update.num_examples:
            what = f"{peak:.3g}, too much to be summed" if math.isfinite(peak) else _NOT_FINITE
            raise UpdateError(f"{who}: {name} holds {what}")
    if not isinstance(update.train_loss, float) or not math.isfinite(update.train_loss):
        raise UpdateError(f"{who}: train_loss is {update.train_loss}: does any of its examples have a label?")
    _check_usage(who, update, routers)
    _check_sums(who, update, sums or {})


_NOT_FINITE = (
    "values that are not finite: either an example of the client does, too, or its training diverged (a lower "
    "learning_rate, or max_grad_norm)"
)


def _check_usage(who: str, update: ClientUpdate, routers: torch.Size | None) -> None:
    usage = update.usage
    if routers is None:
        if usage is not None:
            raise UpdateError(f"{who}: usage is given, but the method clusters nothing")
        return
    if usage is None:
        raise UpdateError(f"{who}: usage is missing, expected shape {tuple(routers)}")
    if not isinstance(usage, Tensor) or not usage.is_floating_point():
        found = usage.dtype if isinstance(usage, Tensor) else type(usage).__name__
        raise UpdateError(f"{who}: usage is {found}, expected a tensor of floating-point numbers")
    if usage.shape != routers:
        raise UpdateError(f"{who}: usage has shape {tuple(usage.shape)}, expected {tuple(routers)}")
    whole = update.num_examples
    even = all(math.isclose(row, whole, rel_tol=1e-3) for row in usage.sum(dim=-1).tolist())
    if not even or not bool((usage >= 0).all()):
        raise UpdateError(f"{who}: usage must be at least 0 and sum to num_examples={update.num_examples} in each row")


def _check_sums(who: str, update: ClientUpdate, expected: Mapping[str, torch.Size]) -> None:
    found = update.sums
    if found.keys() != expected.keys():
        raise UpdateError(f"{who}: sums of {sorted(found)}, expected {sorted(expected)}")
    for name, shape in expected.items():
        value = found[name]
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != torch.float64:
            kind = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise UpdateError(f"{who}: the sum {name} is {kind}, expected {tuple(shape)} torch.float64")
    if not update.told_peak < _MOST:
        name = next(name for name, peak in _peaks(found).items() if not peak < _MOST)
        raise UpdateError(f"{who}: the sum {name} holds values that are not finite, or too large")


def update_norm(deltas: Mapping[str, Tensor]) -> float:
    """The L2 norm of all tensors as one vector."""
    if not deltas:
        return 0.0
    # In float64: the square of a number that float32 holds may be more than it holds.
    norms = torch._foreach_norm([delta for delta in deltas.values() if delta.numel()], 2, torch.float64)
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def clip_update(update: ClientUpdate, max_norm: float) -> ClientUpdate:
    """Scale an update down to an L2 norm of at most `max_norm`; a smaller one, or zero, is returned as it is."""
    norm = update_norm(update.deltas)
    if norm <= max_norm:
        return update
    return replace(update, deltas={name: delta * (max_norm / norm) for name, delta in update.deltas.items()})


class WeightedMean:
    """The running sums of a cohort's updates, so that memory does not grow with the cohort.

        u   ← Σ Nᵏ uᵏ / Σ Nᵏ                       (shared; weights p(k))
        a_c ← Σ π̂ᵏ_c Nᵏ aᵏ_c / Σ π̂ᵏ_c Nᵏ           (clustered; weights p(k|c))

    Both are kept as differences from the server's values. The sums are exact: the means have the same bits in any
    order of the clients.

    Args:
        reference: The server's public tensors.
        groups: Which of them are shared, which clustered.
        cohort_size: Most updates that may be added, over all processes.
        routers: The shape (L, C) of `usage`; None where nothing is clustered.
        sums: The names and shapes of the updates' `sums`.
    """

    def __init__(
        self,
        reference: Mapping[str, Tensor],
        groups: ParameterGroups,
        cohort_size: int,
        routers: torch.Size | None = None,
        sums: Mapping[str, torch.Size] | None = None,
    ) -> None:
        self._groups = groups
        self._sums = {name: ExactSum(value, cohort_size) for name, value in reference.items()}
        self._scratch = _largest(self._sums.values())
        self._usage = None if routers is None else ExactSum(torch.zeros(routers), cohort_size)
        self._shapes = dict(sorted((sums or {}).items()))
        length = sum(shape.numel() for shape in self._shapes.values())
        self._told = ExactSum(torch.zeros(length), cohort_size) if length else None  # all in one, for they are small
        self._examples = 0

    def add(self, update: ClientUpdate) -> None:
        """Add an update that `check_update` let pass. Its tensors must stay as they are until the mean is made."""
        most = max(update.num_examples, 0.0 if update.usage is None else float(update.usage.max()))
        used = _Used(update.usage)
        for name, delta in update.deltas.items():
            total = self._sums[name]
            cluster = self._groups.clustered.get(name)
            weight = update.num_examples if cluster is None else _along(update.usage, cluster, total)
            part = None if cluster is None or total.waits else used.part(cluster, total)
            total.add(delta, weight, update.peaks[name] * most, self._scratch[total.device], part)
        self._examples += update.num_examples
        if update.usage is not None and self._usage is not None:
            self._usage.add(update.usage, 1, most)
        if self._told is not None:
            self._told.add(update.told, 1, update.told_peak)

    def reduce(self, processes: Processes) -> None:
        """Make these the sums of what all processes have added; the same bits as if one had added it all."""
        if processes.count == 1:
            return
        sums = [*self._sums.values(), *(total for total in (self._usage, self._told) if total is not None)]
        told = processes.collect([self._examples, [total.classes() for total in sums]])
        self._examples = sum(examples for examples, _ in told)
        live = [sorted(set().union(*classes)) for classes in zip(*(classes for _, classes in told), strict=True)]
        processes.sum(part for total, classes in zip(sums, live, strict=True) for part in total.parts(classes))

    def result(self) -> Aggregate:
        """The means of what was added. An adaptor without users has a mean of zero: it keeps its value.

        Raises:
            ValueError: Nothing was added.
        """
        if self._examples == 0:
            raise ValueError("no update was added: there is nothing to average.")
        usage = None if self._usage is None else self._usage.result()
        share = None if usage is None else usage / self._examples
        weight = None if usage is None or share is None else torch.where(share > LEAST_USAGE, usage.reciprocal(), 0.0)
        deltas = {}
        for name, total in self._sums.items():
            cluster = self._groups.clustered.get(name)
            scale = 1 / self._examples if cluster is None else _along(weight, cluster, total)
            deltas[name] = total.result().mul_(scale)
        told: Sequence[Tensor] = ()
        if self._told is not None:
            told = self._told.result().split([shape.numel() for shape in self._shapes.values()])
        sums = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), told, strict=True)}
        return Aggregate(deltas, share, sums)


def _largest(sums: Iterable[ExactSum]) -> dict[torch.device, Tensor]:
    """One scratch tensor per device that holds the largest term of the sums there."""
    sizes: dict[torch.device, int] = {}
    for total in sums:
        sizes[total.device] = max(sizes.get(total.device, 0), total.shape.numel())
    return {device: torch.empty(size, dtype=torch.float64, device=device) for device, size in sizes.items()}


def _along(weights: Tensor | None, cluster: Clustered, like: Tensor | ExactSum) -> Tensor:
    """Weights (L, C) of one slot, shaped to scale the slices of a tensor along its axis of length C."""
    if weights is None:
        raise ValueError("a clustered tensor needs the usage of the adaptors.")
    of_slot = weights[cluster.slot].to(like.device)
    if cluster.adaptor is not None:
        return of_slot[cluster.adaptor]
    shape = [1] * len(like.shape)
    shape[cluster.axis] = -1
    return of_slot.view(shape)


class _Used:
    """The adaptors that an update's client uses, by slot.

    Args:
        usage: The update's usage, (L, C).
    """

    def __init__(self, usage: Tensor | None) -> None:
        self._usage = usage

    @cached_property
    def _numbers(self) -> list[Tensor]:
        return [] if self._usage is None else [row.nonzero().squeeze(1) for row in self._usage]

    def part(self, cluster: Clustered, total: ExactSum) -> tuple[int, Tensor] | None:
        """Where a clustered tensor counts: its axis of length C, and the adaptors in use. None: everywhere."""
        if cluster.adaptor is not None or len(self._numbers[cluster.slot]) == total.shape[cluster.axis]:
            return None
        return cluster.axis, self._numbers[cluster.slot]


def keep_unused(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], used: Tensor | None, groups: ParameterGroups
) -> dict[str, Tensor]:
    """New tensors, but with the old slices of adaptors that had no users (a server optimiser's momentum moves them).

    Args:
        new: The server's new tensors.
        old: The server's tensors before the round.
        used: Which adaptors had users, bool (L, C).
        groups: Which tensors are clustered, and along which axis.
    """
    kept = dict(new)
    if used is not None and not bool(used.all()):
        for name, cluster in groups.clustered.items():
            kept[name] = torch.where(_along(used, cluster, new[name]), new[name], old[name])
    return kept


def mean_entropy(usages: list[Tensor]) -> float:
    """The mean of the clients' router entropies in nats, from the scalars π̂ᵏ_c Nᵏ that they sent.

    Args:
        usages: One (L, C) tensor per client.
    """
    mixtures = torch.stack([usage / usage.sum(dim=-1, keepdim=True) for usage in usages])
    entropies = torch.special.entr(mixtures).sum(dim=-1)  # (clients, L)
    return math.fsum(entropies.flatten().tolist()) / entropies.numel()


def cluster_mismatch(usages: list[Tensor], clusters: list[int]) -> float:
    """How far the weights p̂(k|c) of the adaptors are from p(k|c) under the true clusters: the paper's ‖δ_c‖₁.

    An adaptor's number says nothing of the cluster that it serves: each cluster is compared with the adaptor whose
    weights come nearest. Of routers by layer, the mean usage counts.

    Args:
        usages: One (L, C) tensor π̂ᵏ_c Nᵏ per client.
        clusters: The true cluster of each of these clients.

    Returns:
        The mean over the cohort's clusters, in [0, 2]; 0 where each has an adaptor of its own.
    """
    used = torch.stack([usage.mean(dim=0) for usage in usages])  # (clients, C)
    found = used / used.sum(dim=0).clamp(min=torch.finfo(used.dtype).tiny)
    members = torch.tensor([[cluster == own for own in sorted(set(clusters))] for cluster in clusters])
    true = members * used.sum(dim=1, keepdim=True)  # π = 1 at the client's own cluster: the weights are Nᵏ
    true = true / true.sum(dim=0)
    distances = (found[:, :, None] - true[:, None, :]).abs().sum(dim=0)  # (C, clusters)
    return float(distances.amin(dim=0).mean())
