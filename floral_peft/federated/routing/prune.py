"""Which adaptors can go: those that nobody uses, and those whose users would lose little with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


#: An adaptor with less than this share of the clients is dead.
LEAST_SHARE = 0.01
#: An adaptor is dispensable where its users would lose less than this with another, by `regrets`.
LEAST_REGRET = 0.1
#: So many adaptors stay, whatever happens.
FEWEST = 1
#: Most of the adaptors that may go as dispensable at once: their users move, and with them what the others are for.
MOST_AT_ONCE = 0.25


@dataclass(frozen=True)
class Drop:
    """An adaptor that goes, and why.

    Args:
        adaptor: Its number.
        why: "dead", "dispensable", or "bound": more were left at the end of the search than may stay; or "pooled":
            all are made one.
        share: The share of the clients that used it.
        instead: The adaptor with which its users lose least; None for a dead one.
        regret: What they lose with it, by `regrets`; None for a dead one.
    """

    adaptor: int
    why: str
    share: float
    instead: int | None = None
    regret: float | None = None


def told(drops: Sequence[Drop], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """What a record says of adaptors that go.

    Args:
        drops: By the adaptors' present numbers.
        numbers: The numbers that they had when the run began.
    """
    names: dict[int | None, int | None] = {None: None, **dict(enumerate(numbers))}
    return [{**vars(drop), "adaptor": names[drop.adaptor], "instead": names[drop.instead]} for drop in drops]


def regrets(usage: Tensor, losses: Tensor, errors: Tensor | None = None) -> Tensor:
    """R_cb: what the users of adaptor c would lose with b in place of it, in units of what adaptors matter at all.

        M = N / U,   G_cb = M_cb − M_cc,   R_cb = (G_cb + E_cb) / Σ_a w_a max_b G_ab,   w = U / ΣU

    Two adaptors of one cluster are near 0 for each other's users; adaptors of different clusters near 1.

    Args:
        usage: U, how many clients each adaptor stood for of late, (C,).
        losses: N, the sums of their losses under each adaptor, (C, C): a row for the users, a column for the adaptor.
        errors: E, by how much G may be too low, (C, C), 0 on its diagonal; none by default.

    Returns:
        (C, C); its diagonal is 0. All of it, where adaptors do not matter.
    """
    tiny = torch.finfo(usage.dtype).tiny
    means = losses / usage.clamp(min=1e-9).unsqueeze(1)
    gaps = means - means.diagonal().unsqueeze(1)
    share = usage / usage.sum().clamp(min=tiny)
    matter = (share * gaps.amax(dim=1)).sum()
    if not float(matter) > 0:
        return torch.zeros_like(gaps)
    return (gaps if errors is None else gaps + errors) / matter


def prune(usage: Tensor, losses: Tensor, errors: Tensor | None = None) -> list[Drop]:
    """The adaptors that can go now, in the order in which they do.

    First the dead ones. Then, one after the other, the one whose users lose least with another, if that is little;
    of two that are dispensable for each other the less used. Nothing is averaged: its users fall to their next best.

    Args:
        usage: U, (C,).
        losses: N, (C, C).
        errors: E, (C, C), see [`regrets`]: the larger, the more adaptors stay.
    """
    if not bool(usage.sum() > 0):
        return []
    drops = dead(usage)
    alive = sorted(set(range(len(usage))) - {drop.adaptor for drop in drops})
    for _ in range(max(1, int(MOST_AT_ONCE * len(alive)))):
        found = _least_regretted(usage, losses, alive, errors)
        if found is None or found.regret is None or found.regret >= LEAST_REGRET:
            break
        drops.append(found)
        alive.remove(found.adaptor)
    return drops


def dead(usage: Tensor) -> list[Drop]:
    """The adaptors that nobody uses, in the order in which they go.

    Args:
        usage: U, (C,); not all of it 0.
    """
    shares = usage / usage.sum()
    unused = [adaptor for adaptor in shares.argsort(stable=True).tolist() if float(shares[adaptor]) < LEAST_SHARE]
    return [Drop(adaptor, "dead", float(shares[adaptor])) for adaptor in unused[: len(usage) - FEWEST]]


def cut(usage: Tensor, losses: Tensor, most: int) -> list[Drop]:
    """The adaptors that go so that no more than so many are left, in the order in which they do.

    One after the other, that one without which the users of all, also of those that have gone, lose least if each
    takes the best of what is left. (By what its own users lose alone, one that nobody needs but that is nobody's worst
    inherits the users of one cluster after the other, and then goes with all of them.)

    Args:
        usage: U, (C,).
        losses: N, (C, C).
        most: How many may stay, 1 or more.
    """
    found = regrets(usage, losses)
    shares = usage / usage.sum().clamp(min=torch.finfo(usage.dtype).tiny)
    alive: list[int] = list(range(len(usage)))
    drops: list[Drop] = []
    while len(alive) > max(most, FEWEST):
        least, places = found[:, alive].topk(2, dim=1, largest=False)  # users lose what their second best is worse
        lost = found.new_zeros(len(alive)).index_add(0, places[:, 0], shares * (least[:, 1] - least[:, 0]))
        adaptor = min(zip(lost.tolist(), shares[alive].tolist(), alive, strict=True))[-1]  # of two alike the less used
        alive.remove(adaptor)
        instead = alive[int(found[adaptor, alive].argmin())]
        drops.append(Drop(adaptor, "bound", float(shares[adaptor]), instead, float(found[adaptor, instead])))
    return drops


def lost_with(usage: Tensor, losses: Tensor, kept: Sequence[int]) -> float:
    """What the users of all lose on average if only some adaptors stay, and each takes the best of these.

        Σ_a w_a min_{b kept} R_ab

    in the units of [`regrets`]. Below 0 where users would do better with another than with their own.

    Args:
        usage: U, (C,).
        losses: N, (C, C).
        kept: Those that stay, one or more.
    """
    shares = usage / usage.sum().clamp(min=torch.finfo(usage.dtype).tiny)
    return float((shares * regrets(usage, losses)[:, list(kept)].amin(dim=1)).sum())


def _least_regretted(usage: Tensor, losses: Tensor, alive: list[int], errors: Tensor | None) -> Drop | None:
    """Of several adaptors that one whose users lose least with another; None where there is but one.

    Of two that are dispensable for each other it is the less used.
    """
    if len(alive) <= FEWEST:
        return None
    chosen = torch.tensor(alive)
    known = [tensor[chosen][:, chosen] for tensor in (losses, errors) if tensor is not None]
    found = regrets(usage[chosen], *known).fill_diagonal_(torch.inf)
    first, second = divmod(int(found.argmin()), len(alive))
    mutual = float(found[second, first]) < LEAST_REGRET
    if mutual and float(usage[chosen[second]]) < float(usage[chosen[first]]):
        first, second = second, first
    adaptor, instead = alive[first], alive[second]
    share = float(usage[adaptor] / usage.sum())
    return Drop(adaptor, "dispensable", share, instead, float(found[first, second]))
