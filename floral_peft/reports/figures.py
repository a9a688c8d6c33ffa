"""Pictures of a task's methods over seeds. Every function returns a matplotlib `Figure`, or none without its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from floral_peft.reports.labels import row_title
from floral_peft.reports.matrix import Cell
from floral_peft.reports.runs import Run
from floral_peft.reports.series import Series, evaluations, gigabytes
from floral_peft.reports.style import (
    GRID,
    INK,
    legend_beside,
    looks,
    name_axes,
    new_figure,
    scale_metric,
    scale_rounds,
    scale_sizes,
    size_unit,
)


LEGEND = 1.9  # inches


def draw_series(axes: Axes, series: Series, label: str, style: dict[str, Any]) -> None:
    """A line with its band over seeds."""
    line = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": style["linewidth"]}
    axes.plot(series.rounds, series.mean, label=row_title(label), **line)
    if series.band is not None:
        axes.fill_between(series.rounds, *series.band, color=style["color"], alpha=0.16, linewidth=0)


def plot_progress(cells: Sequence[Cell]) -> Figure | None:
    """The metric over the rounds: all test examples, and the worst 10 % of clients."""
    titles = {"": "all examples", "worst_decile": "worst 10 % of clients"}
    drawn = {part: [(cell, evaluations(cell, part)) for cell in cells] for part in titles}
    drawn = {part: some for part, found in drawn.items() if (some := [one for one in found if one[1] is not None])}
    if not any(series is not None and len(series.rounds) > 1 for found in drawn.values() for _, series in found):
        return None
    labels = [cell.label for cell in cells]
    style = looks(labels)
    figure, panels = new_figure(3.1 * len(drawn) + LEGEND, max(2.9, 0.2 * len(cells)), len(drawn))
    for axes, (part, found) in zip(panels, drawn.items(), strict=True):
        for cell, series in found:
            if series is not None:
                draw_series(axes, series, cell.label, style[cell.label])
        name_axes(axes, "round", cells[0].metric if axes is panels[0] else "", titles[part])
        means = [series.mean for _, series in found if series is not None]
        if cells[0].metric == "accuracy":  # what comes after the first steps is what differs
            lows = [one.mean if one.band is None else one.band[0] for _, one in found if one is not None]
            axes.set_ylim(bottom=min(low[len(low) // 10 :].min() for low in lows) - 0.02)
        scale_metric(axes, cells[0].metric, values=np.concatenate(means))
        scale_rounds(axes)
    legend_beside(figure, panels[0], labels)
    return figure


def plot_clients(cells: Sequence[Cell], baselines: Sequence[Cell]) -> Figure | None:
    """How the metric is spread over the clients, and how many are better and worse off than with a baseline.

    Args:
        cells: The methods.
        baselines: Those among them to compare with.
    """
    name = f"eval_{cells[0].metric}"
    pooled = {
        cell.label: np.array([row[name] for run in cell.runs for row in run.client_metrics.values() if name in row])
        for cell in cells
    }
    cells = [cell for cell in cells if len(pooled[cell.label])]
    if not cells:
        return None
    style = looks([cell.label for cell in cells])
    compared = [one for one in baselines if any(cell.gained_and_lost(one) for cell in cells)]
    figure = Figure(figsize=(5.4 + 2.1 * len(compared), 0.9 + 0.3 * len(cells)), layout="constrained")
    panels = figure.subplots(
        1, 1 + len(compared), squeeze=False, sharey=True, width_ratios=[2.2, *[1.2] * len(compared)]
    )
    axes = panels[0][0]
    for row, cell in enumerate(cells):
        _draw_spread(axes, row, pooled[cell.label], style[cell.label]["color"], cell.metric.endswith("loss"))
    axes.set_yticks(range(len(cells)), [row_title(cell.label) for cell in cells])
    axes.set_ylim(len(cells) - 0.5, -0.5)
    name_axes(axes, f"{cells[0].metric} of a client", "", "quartiles, 5–95 %, ▲ worst 10 %")
    scale_metric(
        axes, cells[0].metric, "x", [v for values in pooled.values() for v in np.quantile(values, (0.05, 0.95))]
    )
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    for axes, baseline in zip(panels[0][1:], compared, strict=True):
        _draw_gains(axes, cells, baseline)
    for axes in panels[0]:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK, length=0)
        axes.set_axisbelow(True)
    return figure


def _draw_spread(axes: Axes, row: int, values: np.ndarray, colour: str, is_loss: bool) -> None:
    low, first, median, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    axes.plot([low, high], [row, row], color=colour, linewidth=1.0)
    axes.plot([first, third], [row, row], color=colour, linewidth=6.0, alpha=0.55, solid_capstyle="butt")
    axes.plot(median, row, "|", color=INK, markersize=9, markeredgewidth=1.4)
    ascending = np.sort(values)
    tenth = math.ceil(len(values) / 10)
    worst = ascending[-tenth:] if is_loss else ascending[:tenth]
    axes.plot(worst.mean(), row, "^", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.5)


def _draw_gains(axes: Axes, cells: Sequence[Cell], baseline: Cell) -> None:
    for row, cell in enumerate(cells):
        shares = cell.gained_and_lost(baseline)
        if shares is None:
            continue
        gained, lost = shares
        axes.barh(row, gained, height=0.55, color="#3a8f5c", alpha=0.85)
        axes.barh(row, -lost, height=0.55, color="#c23b4e", alpha=0.85)
        axes.text(gained + 0.04, row, f"{gained:.0%}", va="center", ha="left", fontsize=7, color=INK)
        axes.text(-lost - 0.04, row, f"{lost:.0%}", va="center", ha="right", fontsize=7, color=INK)
    axes.axvline(0, color=INK, linewidth=0.7)
    axes.set_xlim(-1.4, 1.4)
    axes.set_xticks([-1, 0, 1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0%}"))
    name_axes(axes, "clients worse, better off", "", f"against {row_title(baseline.label)}")


def plot_cost(cells: Sequence[Cell]) -> Figure | None:
    """The metric against the parameters of a client's model, and against what was sent until then."""
    labels = [cell.label for cell in cells]
    style = looks(labels)
    figure, (left, right) = new_figure(6.6 + LEGEND, max(2.9, 0.2 * len(cells)), 2)
    metric, told = cells[0].metric, False
    totals = [max(sent.values()) for cell in cells if (sent := gigabytes(cell.runs[0]))]
    unit, size = size_unit(max(totals, default=0.0))
    for cell in cells:
        line = style[cell.label]
        parameters, spread = cell.of_runs(_relative_size), cell.spread()
        if parameters is not None and spread is not None:
            told = True
            left.errorbar(
                parameters.mean, spread.mean, yerr=spread.std, fmt=line["marker"], color=line["color"], markersize=6,
                markerfacecolor=line["markerfacecolor"], elinewidth=1, capsize=2, label=row_title(cell.label),
            )  # fmt: skip
        series, sent = evaluations(cell), gigabytes(cell.runs[0])
        if series is None or sent is None:
            continue
        told, dashes = True, {key: line[key] for key in ("color", "linestyle", "linewidth")}
        if not any(sent.values()):  # nothing leaves its client
            right.axhline(series.mean[-1], **{**dashes, "linestyle": ":", "linewidth": 1.0})
            continue
        x = [sent.get(at, math.nan) / size for at in series.rounds]
        right.plot(x, series.mean, label=row_title(cell.label), **dashes)
        if series.band is not None:
            right.fill_between(x, *series.band, color=line["color"], alpha=0.16, linewidth=0)
    if not told:
        return None
    for axes in (left, right):
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        scale_metric(axes, metric, values=[spread.mean for cell in cells if (spread := cell.spread()) is not None])
    left.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    name_axes(left, "parameters of a client's model, base = 100 %", metric, "after the last round")
    if right.lines:
        scale_sizes(right)
    name_axes(right, f"sent by server and clients, {unit}", "", "while training")
    legend_beside(figure, left if left.get_legend_handles_labels()[0] else right, labels)
    return figure


def _relative_size(run: Run) -> float | None:
    parameters, base = run.result.get("parameters"), run.result.get("base_parameters")
    return parameters / base if parameters and base else None
