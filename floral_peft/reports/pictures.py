"""Pictures of a run. Every function returns a matplotlib `Figure`: show it in a notebook, or `savefig` it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, groupby

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from floral_peft.federated import ClientId
from floral_peft.reports.clusters import adaptor_of_each_client, clusters_found
from floral_peft.reports.runs import Run
from floral_peft.reports.style import COLOURS, INK


MOST_NAMED_CLIENTS = 40
#: An adaptor is used where a client gives it this weight.
_USED = 0.01


def plot_mixtures(ids: Sequence[ClientId], mixtures: Tensor, clusters: Mapping[ClientId, int] | None = None) -> Figure:
    """Every client's mixture as a row of shades: clients by true cluster, adaptors as columns.

    Columns stand in the order in which the clusters use them, so that well separated clusters show as a diagonal of
    blocks; their labels are the adaptors' own numbers, from 0.

    Args:
        ids: The clients, in the order of the rows of `mixtures`.
        mixtures: One row per client, each summing to 1 [clients, C].
        clusters: Client id → true cluster. `None`, where it is not known: clients are grouped by their main adaptor.
    """
    group = dict(zip(ids, adaptor_of_each_client(mixtures), strict=True)) if clusters is None else clusters
    order, columns, _ = order_mixtures(ids, mixtures, clusters)
    shown = mixtures[order]

    width, height = 2.1 + 0.4 * len(columns), 1.1 + min(max(2.4, 0.17 * len(ids)), 8.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        shown[:, columns].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    _label_clients(axes, [ids[row] for row in order], group, "adaptor" if clusters is None else "cluster")
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_xlabel("adaptor", fontsize=9, color=INK)
    axes.tick_params(length=0, labelsize=8, colors=INK)
    for spine in axes.spines.values():
        spine.set(linewidth=0.6, color=INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=16, ticks=[0, 0.5, 1])
    bar.ax.set_title("weight", fontsize=8, color=INK)
    bar.ax.tick_params(length=0, labelsize=8, colors=INK)
    bar.outline.set_linewidth(0.6)
    found = clusters_found(ids, mixtures, clusters)
    title = "Mixtures of adaptors" + ("" if found is None else f"\nadjusted Rand index {found:.2f}")
    axes.set_title(title, fontsize=9, color=INK)
    return figure


def order_mixtures(
    ids: Sequence[ClientId], mixtures: Tensor, clusters: Mapping[ClientId, int] | None
) -> tuple[list[int], list[int], list[int]]:
    """The order of rows and columns in which clusters show as blocks on the diagonal.

    Args:
        ids: As of [`plot_mixtures`].
        mixtures: As there.
        clusters: As there.

    Returns:
        The rows, the columns, and the group of each row in that order.
    """
    main = adaptor_of_each_client(mixtures)
    group = main if clusters is None else [clusters[client] for client in ids]
    order = sorted(range(len(ids)), key=lambda row: (group[row], main[row], row))
    return order, _by_place(mixtures[order]), [group[row] for row in order]


def plot_curves(runs: Sequence[Run], metric: str) -> Figure:
    """The metric over the rounds: a colour for each run, solid the mean over clients, dashed the worst 10 % of them.

    A dotted line stands where a search ends: adaptors are then compressed, and learn again for some rounds.

    Args:
        runs: The runs, named by their methods.
        metric: Name without `eval_`.

    Raises:
        ValueError: If a run did not measure it.
    """
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for run, colour in zip(runs, cycle(COLOURS), strict=False):
        rounds = sorted(run.evaluations)
        for part, style in (("client_mean", "-"), ("worst_decile", "--")):
            name = f"eval_{metric}_{part}"
            if not rounds or any(name not in run.evaluations[at] for at in rounds):
                raise ValueError(f"{run.folder} has no {name} in its evaluations.")
            values = [run.evaluations[at][name] for at in rounds]
            label = f"{run.method}, mean over clients" if style == "-" else None
            axes.plot(rounds, values, style, color=colour, linewidth=1.8 if label else 1.0, label=label)
    axes.plot([], [], "--", color=INK, linewidth=1.0, label="worst 10 % of clients")
    for at in {at for run in runs if (at := run.search_ended) is not None}:
        axes.axvline(at, color=INK, linewidth=0.7, linestyle=":")
        axes.annotate(
            "search ends", (at, 0.01), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
            fontsize=7, color=INK,
        )  # fmt: skip
    axes.set_xlabel("round", fontsize=9, color=INK)
    axes.set_ylabel(f"{metric} of a client", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    axes.tick_params(labelsize=8, colors=INK)
    axes.legend(frameon=False, loc="best", fontsize=8)
    return figure


def _by_place(mixtures: Tensor) -> list[int]:
    """Adaptors by where down the page [clients, C] they are used, on average; those that nobody uses come last."""
    place = torch.arange(len(mixtures), dtype=mixtures.dtype) @ mixtures / mixtures.sum(dim=0).clamp_min(1e-12)
    place[mixtures.amax(dim=0) < _USED] = len(mixtures)
    columns: list[int] = place.argsort().tolist()
    return columns


def _label_clients(axes: Axes, ids: Sequence[ClientId], group: Mapping[ClientId, int], kind: str) -> None:
    """Rows named by client while there is room, a line between groups, and each group's name beside it."""
    axes.set_yticks(range(len(ids)), [str(client) for client in ids])
    if len(ids) > MOST_NAMED_CLIENTS:
        axes.set_yticks([])
    axes.set_ylabel("client", fontsize=9, color=INK)
    start = 0
    for name, members in groupby(ids, key=lambda client: group[client]):
        end = start + len(list(members))
        if start:
            axes.axhline(start - 0.5, color=INK, linewidth=0.8)
        axes.annotate(
            f"{kind} {name}",
            xy=(1.03, (start + end - 1) / 2),
            xycoords=("axes fraction", "data"),
            rotation=270,
            va="center",
            fontsize=8,
            color=INK,
        )
        start = end
