"""What runs recorded over their rounds, as arrays over seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from floral_peft.reports.matrix import Cell
from floral_peft.reports.runs import Run


Record = dict[str, Any]


class Series(NamedTuple):
    """Values by seed and round.

    Args:
        rounds: The rounds [R] that every seed has.
        values: NaN where there is no number [seeds, R].
    """

    rounds: np.ndarray
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over seeds [R]."""
        mean: np.ndarray = self.values.mean(axis=0)
        return mean

    @property
    def band(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The mean minus and plus a standard deviation [R], for several seeds; no lower than the lowest of them.

        A loss that differs by orders of magnitude would else end below zero.
        """
        if len(self.values) < 2:
            return None
        deviation = self.values.std(axis=0, ddof=1)
        return np.maximum(self.mean - deviation, self.values.min(axis=0)), self.mean + deviation

    def smooth(self, points: int = 100) -> Series:
        """Means over as many successive rounds as leave about `points` of them."""
        width = max(1, len(self.rounds) // points)
        kept = len(self.rounds) // width * width
        return Series(
            self.rounds[:kept].reshape(-1, width).mean(axis=1),
            self.values[:, :kept].reshape(len(self.values), -1, width).mean(axis=2),
        )


def evaluations(cell: Cell, part: str = "") -> Series | None:
    """The cell's metric over rounds; none if no round was evaluated in all runs."""
    name = f"eval_{cell.metric}" + (f"_{part}" if part else "")
    return _series(cell, "evaluate", lambda record: record.get(name))


def by_round(cell: Cell, value: Callable[[Record], float | None]) -> Series | None:
    """A number of each round's record; none where a run has it not."""
    return _series(cell, "round", value)


def usage(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """The adaptors' shares of the cohort's examples: rounds [R] and shares [C, R]; none if they were not recorded.

    C counts the adaptors at first; one that is removed has a share of 0 from then on.
    """
    found = {one["round"]: one for one in run.records if one["event"] == "round" and one.get("usage")}
    if not found:
        return None
    rounds = sorted(found)
    numbers = [found[at].get("adaptors") or list(range(len(found[at]["usage"]))) for at in rounds]
    shares = np.zeros((1 + max(map(max, numbers)), len(rounds)))
    for column, (at, present) in enumerate(zip(rounds, numbers, strict=True)):
        shares[present, column] = found[at]["usage"]
    return np.array(rounds), shares


def gigabytes(run: Run) -> dict[int, float] | None:
    """Round → what the clients and the server have sent one another so far; none if it was not recorded."""
    rounds = [record for record in run.records if record["event"] == "round"]
    if not rounds or any(name not in one for one in rounds for name in ("bytes_up", "bytes_down", "clients_trained")):
        return None
    sent = np.cumsum([(one["bytes_up"] + one["bytes_down"]) * one["clients_trained"] / 1e9 for one in rounds])
    return {0: 0.0} | {one["round"]: gb for one, gb in zip(rounds, sent.tolist(), strict=True)}


def _series(cell: Cell, event: str, value: Callable[[Record], float | None]) -> Series | None:
    runs = [
        {one["round"]: number for one in run.records if one["event"] == event and (number := value(one)) is not None}
        for run in cell.runs
    ]
    rounds = sorted(set(runs[0]).intersection(*runs[1:]))
    if not rounds:
        return None
    return Series(np.array(rounds), np.array([[run[at] for at in rounds] for run in runs], dtype=float))
