"""Runs as a matrix: methods by tasks, each cell over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from floral_peft.reports.compare import gains
from floral_peft.reports.labels import is_told_the_truth, row_order, run_labels
from floral_peft.reports.paper import Figure, paper_figure, paper_order
from floral_peft.reports.runs import Run
from floral_peft.reports.table import common_metric


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and their standard deviation (that of a sample, n − 1); none for a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """That of the values; none if there are none, or one of them is no number."""
        if not values or any(not math.isfinite(value) for value in values):
            return None
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Cell:
    """A method on a task.

    Attributes:
        label: The method with its settings.
        runs: Its done runs, one a seed.
        metric: What is measured, without `eval_`.
        paper: What the paper reports.
    """

    label: str
    runs: tuple[Run, ...]
    metric: str
    paper: Figure | None

    def spread(self, part: str = "") -> Spread | None:
        """The metric after the last round: over all examples, or its part "client_mean" or "worst_decile"."""
        name = f"eval_{self.metric}" + (f"_{part}" if part else "")
        return self.of_runs(lambda run: run.metrics.get(name))

    def found(self) -> Spread | None:
        """Adjusted Rand index of the routers against the true clusters."""
        return self.of_runs(lambda run: run.result.get("adjusted_rand_index"))

    def of_runs(self, value: Callable[[Run], float | None]) -> Spread | None:
        """Something of each run; none where one has it not."""
        values = [value(run) for run in self.runs]
        return Spread.of([math.nan if one is None else one for one in values])

    def gained_and_lost(self, baseline: Cell | None) -> tuple[float, float] | None:
        """Shares of the clients that are better and worse off than with the baseline at the same seed.

        Returns:
            None without a baseline, for the baseline itself, or where the two have no seed with the same clients.
        """
        if baseline is None or baseline is self:
            return None
        theirs = {run.seed: run.client_metrics for run in baseline.runs}
        gained = lost = total = 0
        for run in self.runs:
            other = theirs.get(run.seed)
            if not other or other.keys() != run.client_metrics.keys():
                continue
            counts = gains(run.client_metrics, other, f"eval_{self.metric}")
            gained, lost = gained + counts.gained, lost + counts.lost
            total += counts.gained + counts.lost + counts.equal
        return (gained / total, lost / total) if total else None


@dataclass(frozen=True)
class Matrix:
    """All cells there are.

    Attributes:
        tasks: The columns: the paper's in its order, then others.
        labels: The rows, simple methods first.
        cells: (label, task) → cell.
        unfinished: Runs that are not done, and are in no cell.
    """

    tasks: list[str]
    labels: list[str]
    cells: dict[tuple[str, str], Cell]
    unfinished: list[Run]

    def column(self, task: str) -> list[Cell]:
        """A task's cells, in the order of the rows."""
        return [self.cells[label, task] for label in self.labels if (label, task) in self.cells]

    def ranked(self, task: str) -> list[str]:
        """A task's labels from the best mean on, without those whose routers are told the truth."""
        spreads = {cell.label: cell.spread() for cell in self.column(task) if not is_told_the_truth(cell.label)}
        means = {label: spread.mean for label, spread in spreads.items() if spread is not None}
        return sorted(means, key=lambda label: means[label], reverse=not self.is_loss(task))

    def is_loss(self, task: str) -> bool:
        """Whether less of the task's metric is better."""
        return self.column(task)[0].metric.endswith("loss")

    def baseline(self, task: str, label: str) -> Cell | None:
        """The task's cell of that label."""
        return self.cells.get((label, task))

    @property
    def seeds(self) -> list[int]:
        """All seeds in it."""
        return sorted({run.seed for cell in self.cells.values() for run in cell.runs if run.seed is not None})


def matrix(runs: Sequence[Run], metric: str | None = None) -> Matrix:
    """Arrange runs as a matrix.

    Args:
        runs: The runs, of any tasks and methods.
        metric: Name without `eval_`; by default each task's accuracy where all its runs measured it, else its loss.

    Raises:
        ValueError: Two runs are the same method on the same task at the same seed, or no run is done.
    """
    done = [run for run in runs if run.is_done and run.metrics]
    if not done:
        raise ValueError(
            "none of the runs is done: there is nothing to tell yet. (A run that was trained in Python is done once "
            "floral_peft.reports.save_run(trainer) has written what belongs to it.)"
        )
    found: dict[tuple[str, str], list[Run]] = {}
    for run, label in zip(done, run_labels(done), strict=True):
        twins = [other for other in found.setdefault((label, run.task), []) if other.seed == run.seed]
        if twins:
            raise ValueError(
                f"{twins[0].folder} and {run.folder} are both {label} on {run.task} with seed {run.seed}: "
                "leave one of them out."
            )
        found[label, run.task].append(run)
    tasks = sorted({task for _, task in found}, key=paper_order)
    metrics = {task: metric or common_metric([run for run in done if run.task == task]) for task in tasks}
    cells = {
        (label, task): Cell(
            label,
            tuple(sorted(group, key=lambda run: -1 if run.seed is None else run.seed)),
            metrics[task],
            paper_figure(group[0], label) if metrics[task] == "accuracy" else None,
        )
        for (label, task), group in found.items()
    }
    labels = sorted({label for label, _ in found}, key=row_order)
    return Matrix(tasks, labels, cells, [run for run in runs if run not in done])
