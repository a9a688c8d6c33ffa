"""Draws docs/floral.png, what the method is in one picture: python docs/make_picture.py."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from floral_peft.reports.style import COLOURS, INK


ADAPTORS = [COLOURS[index] for index in (0, 1, 2, 3)]
CLIENTS = {
    "Ada": (0.92, 0.03, 0.03, 0.02),
    "Ben": (0.03, 0.02, 0.93, 0.02),
    "Cleo": (0.9, 0.02, 0.06, 0.02),
    "Dan": (0.02, 0.56, 0.02, 0.4),
}


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, edge: str = INK) -> None:
    """A box with round corners."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=edge, lw=0.9))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.0) -> None:
    """An arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, lw=width))


def main() -> None:
    """Draw and write it."""
    figure = Figure(figsize=(9, 3.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9), ylim=(0, 3.3))
    axes.axis("off")
    top = 2.45
    for row, (name, mixture) in enumerate(CLIENTS.items()):
        y = top - 0.72 * row
        box(axes, 0.25, y, 2.75, 0.56, "#f7f7f5")
        axes.text(0.4, y + 0.28, name, va="center", fontsize=10, color=INK)
        start = 1.2
        for weight, colour in zip(mixture, ADAPTORS, strict=True):
            axes.add_patch(Rectangle((start, y + 0.17), 1.6 * weight, 0.22, facecolor=colour, lw=0))
            start += 1.6 * weight
        arrow(axes, (3.08, y + 0.28), (4.0, 1.63 + 0.25 * (1.5 - row)), "#9a9a9a")
    axes.text(1.62, 3.13, "each client's own data, and a router π", ha="center", fontsize=9, color=INK)

    box(axes, 4.1, 0.45, 2.0, 2.4, "white")
    box(axes, 4.3, 1.95, 1.6, 0.7, "#e6e6e4")
    axes.text(5.1, 2.3, "base  W", ha="center", va="center", fontsize=10, color=INK)
    for index, colour in enumerate(ADAPTORS):
        box(axes, 4.3 + 0.42 * index, 0.95, 0.34, 0.72, colour, colour)
        axes.text(4.47 + 0.42 * index, 1.31, f"$a_{index + 1}$", ha="center", va="center", fontsize=10, color="white")
    axes.text(5.1, 1.8, "+", ha="center", va="center", fontsize=12, color=INK)
    axes.text(5.1, 0.69, "low-rank adaptors", ha="center", va="center", fontsize=8.5, color=INK)
    axes.text(5.1, 3.13, "one shared model", ha="center", fontsize=9, color=INK)
    axes.text(5.1, 0.2, r"layer(x) = W x + Σ$_c$ π$_c$ B$_c$A$_c$ x", ha="center", fontsize=9, color=INK)

    for row, (name, mixture) in enumerate(CLIENTS.items()):
        y = top - 0.72 * row
        arrow(axes, (6.2, 1.63 + 0.25 * (1.5 - row)), (7.05, y + 0.28), "#9a9a9a")
        box(axes, 7.1, y, 1.65, 0.56, "#e6e6e4")
        x = 7.1
        for weight, colour in zip(mixture, ADAPTORS, strict=True):
            axes.add_patch(Rectangle((x + 0.06, y + 0.05), 1.53 * weight, 0.08, facecolor=colour, lw=0))
            x += 1.53 * weight
        axes.text(7.92, y + 0.32, f"{name}'s model", ha="center", va="center", fontsize=9.5, color=INK)
    axes.text(7.92, 3.13, "a model for each", ha="center", fontsize=9, color=INK)
    figure.savefig(Path(__file__).parent / "floral.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
