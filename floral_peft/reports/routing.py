"""Pictures of what routers learn: who uses which adaptor, and since when. Those told the truth learn nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from floral_peft.reports.figures import LEGEND, draw_series
from floral_peft.reports.labels import is_told_the_truth, row_title
from floral_peft.reports.matrix import Cell
from floral_peft.reports.pictures import order_mixtures
from floral_peft.reports.runs import Run
from floral_peft.reports.series import Record, Series, by_round, usage
from floral_peft.reports.style import INK, legend_beside, looks, name_axes, new_figure, scale_rounds


MOST_SEEDS = 4


def plot_usage(cells: Sequence[Cell]) -> Figure | None:
    """The adaptors' shares of the examples over the rounds, stacked; a panel per method, at its first seed."""
    found = [(cell, used) for cell in _learning(cells) if (used := usage(cell.runs[0])) is not None]
    if not found:
        return None
    columns = min(len(found), 4)
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(max(3.0, 2.3 * columns + 0.4), 1.9 * rows + 0.3), layout="constrained")
    figure.suptitle("Shares of the adaptors, a shade each (first seed)", fontsize=8, color=INK)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat:
        axes.set_visible(False)
    for axes, (cell, (rounds, shares)) in zip(panels.flat, found, strict=False):
        axes.set_visible(True)
        smooth = Series(rounds, shares).smooth()
        order = np.argsort(-smooth.values[:, -max(1, len(smooth.rounds) // 10) :].mean(axis=1))
        shades = mpl.colormaps["viridis"](np.linspace(0.12, 0.92, len(order)))
        axes.stackplot(smooth.rounds, smooth.values[order], colors=shades, edgecolor="white", linewidth=0.4)
        axes.set_ylim(0, 1)
        scale_rounds(axes)
        axes.set_xlim(smooth.rounds[0], smooth.rounds[-1])
        axes.grid(False)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.tick_params(labelsize=8, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        name_axes(axes, "round", "share of examples" if axes in panels[:, 0] else "", _wrapped(cell.label))
    return figure


def plot_routers(cells: Sequence[Cell]) -> Figure | None:
    """Over the rounds: adaptors in use (the exponential of usage's entropy), routers' entropy, mismatch."""
    kinds = {
        "adaptors in use": _adaptors_in_use,
        "entropy of a router, nats": lambda record: record.get("router_entropy"),
        "mismatch ‖δ‖₁": lambda record: record.get("mismatch"),
    }
    cells = _learning(cells)
    found = {name: [(cell, one) for cell in cells if (one := by_round(cell, value))] for name, value in kinds.items()}
    found = {name: lines for name, lines in found.items() if lines}
    if not found:
        return None
    labels = [cell.label for cell in cells]
    style = looks(labels)
    figure, panels = new_figure(2.6 * len(found) + LEGEND, 2.5, len(found))
    for axes, (name, lines) in zip(panels, found.items(), strict=True):
        for cell, series in lines:
            draw_series(axes, series.smooth(), cell.label, style[cell.label])
        scale_rounds(axes)
        axes.set_ylim(0, 1.06 * max(axes.get_ylim()[1], *(series.mean.max() for _, series in lines)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))  # the same ticks before and after the figure is laid out
        name_axes(axes, "round", name)
    legend_beside(figure, panels[0], labels)
    return figure


def plot_all_mixtures(cells: Sequence[Cell]) -> Figure | None:
    """Every client's mixture as a row of shades, sorted by true cluster: a row of panels per method, one per seed."""
    found = [
        (cell, runs) for cell in _learning(cells) if (runs := [run for run in cell.runs if run.mixtures][:MOST_SEEDS])
    ]
    if not found:
        return None
    columns = max(len(runs) for _, runs in found)
    figure = Figure(figsize=(1.75 * columns + 1.9, 1.4 * len(found) + 0.5), layout="constrained")
    panels = figure.subplots(len(found), columns, squeeze=False)
    image = None
    for row, (cell, runs) in zip(panels, found, strict=True):
        for axes in row[len(runs) :]:
            axes.set_visible(False)
        for axes, run in zip(row, runs, strict=False):
            weights, edges = _sorted_mixtures(run)
            image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for edge in edges:
                axes.axhline(edge - 0.5, color=INK, linewidth=0.5)
            index = run.result.get("adjusted_rand_index")
            told = "" if index is None else f"Rand {round(index, 2) + 0.0:.2f}"  # no −0.00
            axes.set_title(", ".join(filter(None, [f"seed {run.seed}", told])), fontsize=8, color=INK)
            axes.set_yticks([])
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            axes.tick_params(labelsize=7, colors=INK, length=0)
            for spine in axes.spines.values():
                spine.set(linewidth=0.6, color=INK)
        row[0].set_ylabel(_wrapped(cell.label, 3), fontsize=8, color=INK, rotation=0, ha="right", va="center")
    if image is not None:
        bar = figure.colorbar(image, ax=panels, shrink=0.8 / len(found), aspect=14, pad=0.06, ticks=[0, 0.5, 1])
        bar.ax.set_title("weight", fontsize=7, color=INK)
        bar.ax.tick_params(length=0, labelsize=7, colors=INK)
        bar.outline.set_linewidth(0.6)
    figure.supxlabel(
        "adaptor, by the clusters that use it; a row is a client, lines part the clusters", fontsize=8, color=INK
    )
    return figure


def _wrapped(label: str, lines: int = 2) -> str:
    return "\n".join(row_title(label).split(", ", lines - 1))


def _learning(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if not is_told_the_truth(cell.label)]


def _sorted_mixtures(run: Run) -> tuple[np.ndarray, list[int]]:
    """The mixtures [clients, C] by true cluster, and where a cluster begins."""
    ids = [row["client"] for row in run.mixtures]
    clusters = {row["client"]: row["cluster"] for row in run.mixtures if "cluster" in row}
    known = clusters if len(clusters) == len(ids) else None
    order, columns, groups = order_mixtures(ids, torch.tensor([row["mixture"] for row in run.mixtures]), known)
    weights = torch.tensor([run.mixtures[row]["mixture"] for row in order])[:, columns].numpy()
    return weights, [at for at in range(1, len(groups)) if groups[at] != groups[at - 1]]


def _adaptors_in_use(record: Record) -> float | None:
    shares = [share for share in record.get("usage") or [] if share > 0]
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else None
