"""Averaging adaptors as the matrices that they are, not factor by factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from floral_peft.federated.aggregation import LEAST_USAGE, Aggregate, ClientUpdate, WeightedMean
from floral_peft.federated.groups import Clustered, ParameterGroups
from floral_peft.federated.processes import Message, Processes, pack_states, unpack_states
from floral_peft.federated.seeding import ClientId
from floral_peft.tuner import as_factors, as_matrices, refactor


#: A client with a smaller share of an adaptor is left out of it: float32 would not show it.
_LEAST_SHARE = 2.0**-40
#: Factors of this length, relative to the longest, are rounding: their product is 1e-12 of the largest.
_UNUSED = 1e-6


class ProductMean(WeightedMean):
    """The mean of a cohort's updates in which low-rank adaptors are averaged as matrices.

        B_c A_c ← SVD_r(Σ_k p(k|c) Bᵏ_c Aᵏ_c)

    The means of B and of A have another product than the mean of B A: the further clients go in a round, the more so.
    Here the clients' factors are stacked into one long pair, of which QR and the decomposition of a small core make
    factors of rank r again; no matrix of a layer's size is made. Everything else is averaged as ever.

    The singular values are split evenly, and this matters more than the averaging: where B has just left zero, factors
    of one length learn much faster than a B that is confined to the random rows of a long A.

    Two prices: the server sees each client's factors, which no sum can hide (secure aggregation cannot carry them),
    and it holds them all until the round ends: cohort × the adaptors' size. Clients are taken in the order of the
    cohort on the main process, so any number of processes gives the same bits.

    Args:
        reference: The server's public tensors.
        groups: Which of them are shared, which clustered.
        cohort: The clients of the round, in order.
        routers: The shape (L, C) of `usage`; None where nothing is clustered.
        sums: The names and shapes of the updates' `sums`.
    """

    def __init__(
        self,
        reference: Mapping[str, Tensor],
        groups: ParameterGroups,
        cohort: Sequence[ClientId],
        routers: torch.Size | None = None,
        sums: Mapping[str, torch.Size] | None = None,
    ) -> None:
        super().__init__(reference, groups, len(cohort), routers, sums)
        self._reference = reference
        self._positions = {client_id: position for position, client_id in enumerate(cohort)}
        self._pairs = list(_pairs(groups, reference))
        self._held: list[_Held] = []
        self._processes = Processes()

    def add(self, update: ClientUpdate) -> None:
        """Add an update that `check_update` let pass."""
        super().add(update)
        deltas = {name: update.deltas[name] for pair in self._pairs for name in (pair.a, pair.b)}
        usage = None if update.usage is None else update.usage.tolist()
        self._held.append(_Held(self._positions[update.client_id], update.num_examples, usage, deltas))

    def reduce(self, processes: Processes) -> None:
        """Bring all processes' updates together on the main one."""
        super().reduce(processes)
        self._processes = processes
        mine = pack_states(([held.position, held.num_examples, held.usage], held.deltas) for held in self._held)
        everybodys = [state for message in processes.gather(mine) for state in unpack_states(message)]
        self._held = [_Held(position, count, usage, deltas) for (position, count, usage), deltas in everybodys]
        self._held.sort(key=lambda held: held.position)

    def result(self) -> Aggregate:
        """The means of what was added: of the adaptors, the differences of the new factors from the old ones."""
        aggregate = super().result()

        def compute() -> Message:
            deltas, lost = {}, 0.0
            for pair in self._pairs:
                *factors, error = self._average(pair, aggregate.usage)
                lost = max(lost, error)
                for name, factor in zip((pair.a, pair.b), factors, strict=True):
                    deltas[name] = factor - self._reference[name].to(factor)
            return lost, deltas

        lost, deltas = self._processes.on_main(compute)
        placed = {name: delta.to(aggregate.deltas[name].device) for name, delta in deltas.items()}
        return replace(aggregate, deltas=aggregate.deltas | placed, truncation=lost if self._pairs else None)

    def _average(self, pair: _Pair, share: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """New factors of one layer, float64, and the largest relative error that the truncation makes."""
        old_a, old_b = self._reference[pair.a].double(), self._reference[pair.b].double()
        rows, columns = as_matrices(old_a, old_b)
        count, rank, _ = rows.shape
        first, second, lost = rows.clone(), columns.clone(), 0.0
        each = [
            as_matrices(old_a + held.deltas[pair.a].to(old_a), old_b + held.deltas[pair.b].to(old_b))
            for held in self._held
        ]
        weights = torch.stack([held.weights(pair.cluster, count) for held in self._held])  # (clients, C)
        for c in range(count):
            if pair.cluster is not None and share is not None and not share[pair.cluster.slot, c] > LEAST_USAGE:
                continue
            own = weights[:, c] / weights[:, c].sum()
            users = [k for k in range(len(own)) if own[k] > _LEAST_SHARE]
            stacked_rows = torch.cat([each[k][0][c] for k in users])
            stacked_columns = torch.cat([each[k][1][c] for k in users], dim=1)
            terms = own[users].repeat_interleave(rank)[None].to(stacked_rows)
            new_first, new_second, error = refactor(stacked_rows, stacked_columns, terms, rank)
            first[c], second[c] = _open(new_first[0], new_second[0], rows[c], columns[c])
            lost = max(lost, error)
        return *as_factors(first, second, old_a, old_b), lost


def _open(first: Tensor, second: Tensor, old_first: Tensor, old_second: Tensor) -> tuple[Tensor, Tensor]:
    """Keep one factor where both are zero, or the gradients of both would be, and the rank be lost for good.

    Args:
        first: New A, (r, n), its rows in order of descending length.
        second: New B, (m, r).
        old_first: A of before. Where it was the larger one, it is kept in the directions that B A does not use.
        old_second: B of before.
    """
    lengths = first.norm(dim=1)
    unused = lengths <= _UNUSED * lengths.max()
    if old_first.norm() >= old_second.norm():
        return torch.where(unused[:, None], old_first, first), torch.where(unused, 0.0, second)
    return torch.where(unused[:, None], 0.0, first), torch.where(unused, old_second, second)


class _Held(NamedTuple):
    """What is held of a client's update."""

    position: int
    num_examples: int
    usage: list[list[float]] | None
    deltas: Mapping[str, Tensor]

    def weights(self, cluster: Clustered | None, count: int) -> Tensor:
        """What the client counts in each of a layer's adaptors, (C,), float64."""
        if cluster is None or self.usage is None:
            return torch.full((count,), float(self.num_examples), dtype=torch.float64)
        return torch.tensor(self.usage[cluster.slot], dtype=torch.float64)


class _Pair(NamedTuple):
    """The names of a layer's factors, and how they are clustered; None: they are shared."""

    a: str
    b: str
    cluster: Clustered | None


def _pairs(groups: ParameterGroups, reference: Mapping[str, Tensor]) -> Iterator[_Pair]:
    """All pairs of which both factors are averaged."""
    found: dict[tuple[str | None, str], dict[str, str]] = {}
    for name in reference:
        role = groups.roles.get(name)
        if role is not None and role.factor in ("A", "B"):
            found.setdefault((role.layer, role.kind), {})[role.factor] = name
    for names in found.values():
        if len(names) == 2:
            yield _Pair(names["A"], names["B"], groups.clustered.get(names["A"]))
