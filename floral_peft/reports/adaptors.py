"""What became of a run's adaptors, in words: which were removed, which are dead, which are duplicates."""

from __future__ import annotations

from typing import Any

from floral_peft.federated.routing.prune import LEAST_REGRET, LEAST_SHARE
from floral_peft.reports.runs import Run


def adaptors_in_words(run: Run) -> str | None:
    """One paragraph on a run's adaptors, by the numbers that they had at first; none for a run without any."""
    rounds = [record for record in run.records if record["event"] == "round" and record.get("usage")]
    if not rounds:
        return None
    last = rounds[-1]
    numbers = last.get("adaptors") or list(range(len(last["usage"])))
    removed = [(record["round"], drop) for record in rounds for drop in record.get("pruned") or ()]
    gone = {drop["adaptor"] for _, drop in removed}
    left = [number for number in numbers if number not in gone]
    parts = [f"{len(left)} of {len(rounds[0]['usage'])} adaptors are left"]
    if removed:
        parts.append("removed: " + ", ".join(_removal(round, drop) for round, drop in removed))
    dead = [n for n, share in zip(numbers, last["usage"], strict=True) if share < LEAST_SHARE and n not in gone]
    if dead:
        parts.append(f"hardly used: {_listed(dead)}")
    alike = [
        f"{numbers[one]} like {numbers[other]}"
        for one, other in _alike(last.get("regrets") or [])
        if not gone & {numbers[one], numbers[other]}
    ]
    if alike:
        parts.append("duplicates: " + ", ".join(alike))
    return "; ".join(parts) + "."


def _removal(round: int, drop: dict[str, Any]) -> str:
    why = drop["why"]
    if drop["instead"] is not None:
        why = f"{'more than may stay, ' if why == 'bound' else ''}most like {drop['instead']}"
    return f"{drop['adaptor']} ({why}, round {round})"


def _alike(regrets: list[list[float]]) -> list[tuple[int, int]]:
    """Pairs of which the users of the first would lose little with the second; a mutual pair once."""
    pairs = [
        (one, other)
        for one, row in enumerate(regrets)
        for other, regret in enumerate(row)
        if one != other and regret < LEAST_REGRET
    ]
    return [pair for pair in pairs if pair[::-1] not in pairs or pair[0] < pair[1]]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
