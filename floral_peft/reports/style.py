"""What all pictures have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from floral_peft.reports.labels import is_told_the_truth, row_title, sibling


INK = "#222222"
GRID = "#e3e3e3"
_BASELINE = "#6b6b6b"
COLOURS = (
    "#0b5fa5",
    "#d1662a",
    "#3a8f5c",
    "#8a4f9e",
    "#b0912c",
    "#c23b4e",
    "#2a9d9d",
    "#7b4a2d",
    "#d97fae",
    "#5b6ec7",
)
_MARKERS = "osD^vPX<>*"


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a line for each label: FedAvg is grey, the last method blue, true routers dashed."""
    family = {label: sibling(label, labels) for label in labels}
    families = list(dict.fromkeys(family[label] for label in reversed(labels)))
    others = [one for one in families if one != "fedavg"]
    colour = {one: COLOURS[index % len(COLOURS)] for index, one in enumerate(others)} | {"fedavg": _BASELINE}
    marker = {one: _MARKERS[index % len(_MARKERS)] for index, one in enumerate(families)}
    return {
        label: {
            "color": colour[family[label]],
            "linestyle": (0, (4, 1.6)) if is_told_the_truth(label) else "-",
            "marker": marker[family[label]],
            "markerfacecolor": "white" if is_told_the_truth(label) else colour[family[label]],
            "linewidth": 3.0 if family[label] == "fedavg" else 1.5,  # what other methods fall back to shows below them
        }
        for label in labels
    }


def new_figure(width: float, height: float, panels: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure, in inches, with panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    made = figure.subplots(1, panels, squeeze=False, **options)
    axes = list(made[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        for spine in one.spines.values():
            spine.set(linewidth=0.7, color=INK)
        one.tick_params(labelsize=8, colors=INK, width=0.7)
    return figure, axes


def name_axes(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Write what the axes show."""
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.set_title(title, fontsize=9, color=INK)


def scale_metric(axes: Axes, metric: str, axis: str = "y", values: Iterable[float] = ()) -> None:
    """Percent for an accuracy; a logarithm for a loss that falls by more than a tenth of itself."""
    one = axes.yaxis if axis == "y" else axes.xaxis
    finite = [value for value in values if math.isfinite(value)]
    if metric == "accuracy":
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%"))
        if axis == "y":
            axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]), top=min(1.0, axes.get_ylim()[1]))
    elif metric.endswith("loss") and finite and 0 < 10 * min(finite) < max(finite):
        (axes.set_yscale if axis == "y" else axes.set_xscale)("log")
        one.set_major_locator(LogLocator(numticks=6))
        one.set_minor_formatter(NullFormatter())


def size_unit(gigabytes: float) -> tuple[str, float]:
    """The unit in which so much reads well, and how many gigabytes it is."""
    units = (("GB", 1.0), ("MB", 1e-3), ("kB", 1e-6))
    return next((unit for unit in units if gigabytes >= unit[1]), units[-1])


def scale_sizes(axes: Axes) -> None:
    """A logarithm along x, with plain numbers, where sizes differ by more than a factor of ten."""
    drawn = np.concatenate([np.asarray(line.get_xdata(), dtype=float) for line in axes.lines])
    found = drawn[(drawn > 0) & np.isfinite(drawn)]
    if not len(found) or found.max() < 10 * found.min():
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def scale_rounds(axes: Axes) -> None:
    """Whole rounds from 0 on, over horizontal lines."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=GRID, linewidth=0.6)


def legend_beside(figure: Figure, axes: Axes, labels: Sequence[str]) -> None:
    """The methods' names, in the order of the table, to the right of all panels."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    shown = [row_title(label) for label in labels if row_title(label) in handles]
    figure.legend(
        [handles[name] for name in shown],
        shown,
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        handlelength=2.4,
    )
