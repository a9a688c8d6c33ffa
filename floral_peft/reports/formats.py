"""A matrix as text: Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from typing import Any

from floral_peft.reports.labels import row_title, task_title
from floral_peft.reports.matrix import Cell, Matrix, Spread
from floral_peft.reports.paper import Figure, paper_rounds


_EMPTY = "–"
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    " %": r"\,\%",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "π*": r"$\pi^*$",
    "ρ": r"$\rho$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "–": "--",
}


def to_markdown(matrix: Matrix) -> str:
    """The table in Markdown, its columns aligned: the best in bold, the second in italics."""
    head, rows = _table(matrix, mark=lambda text, place: (text, f"**{text}**", f"*{text}*")[place])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return f"| {' | '.join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])} |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([line(head), rule, *map(line, rows), "", caption(matrix)])


def to_latex(matrix: Matrix) -> str:
    r"""The table in LaTeX, for the package booktabs: the best in bold, the second underlined."""
    marks = ("{}", r"\textbf{{{}}}", r"\underline{{{}}}")
    head, rows = _table(matrix, mark=lambda text, place: marks[place].format(_escaped(text)), plain=_escaped)
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", _latex_line(head), r"\midrule"]
    lines += [*map(_latex_line, rows), r"\bottomrule", r"\end{tabular}", f"% {caption(matrix)}"]
    return "\n".join(lines)


def to_csv(matrix: Matrix) -> str:
    """One line per method and task, with all there is to tell, numbers in full."""
    rows = to_rows(matrix)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in row.items()})
    return text.getvalue().rstrip("\n")


def to_json(matrix: Matrix) -> str:
    """The same as JSON."""
    return json.dumps(to_rows(matrix), indent=1)


#: Name of a format → from a matrix to its text.
FORMATS: dict[str, Callable[[Matrix], str]] = {
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
    "json": to_json,
}


def to_rows(matrix: Matrix) -> list[dict[str, Any]]:
    """A row per method and task, as plain values; what was not measured is `None`."""
    rows = []
    for task in matrix.tasks:
        fedavg, alone = matrix.baseline(task, "fedavg"), matrix.baseline(task, "local_only")
        for cell in matrix.column(task):
            run = cell.runs[0]
            row: dict[str, Any] = {"task": task, "method": cell.label, "metric": cell.metric}
            row["seeds"] = [one.seed for one in cell.runs]
            row["values"] = [one.metrics.get(f"eval_{cell.metric}") for one in cell.runs]
            row["rounds"] = run.rounds
            for name, spread in (
                ("", cell.spread()),
                ("client_mean_", cell.spread("client_mean")),
                ("worst_decile_", cell.spread("worst_decile")),
                ("adjusted_rand_index_", cell.found()),
            ):
                row[f"{name}mean"] = spread and spread.mean
                row[f"{name}std"] = spread and spread.std
            row["paper_mean"], row["paper_std"] = cell.paper or (None, None)
            for name, baseline in (("fedavg", fedavg), ("local_only", alone)):
                row[f"gained_against_{name}"], row[f"lost_against_{name}"] = cell.gained_and_lost(baseline) or (
                    None,
                    None,
                )
            row["parameters"], row["base_parameters"] = (
                run.result.get(name) for name in ("parameters", "base_parameters")
            )
            row["bytes_up"], row["bytes_down"] = run.last_round.get("bytes_up"), run.last_round.get("bytes_down")
            row["folders"] = [str(one.folder) for one in cell.runs]
            rows.append(row)
    return rows


def caption(matrix: Matrix) -> str:
    """What the table's numbers and marks mean."""
    seeds = ", ".join(map(str, matrix.seeds))
    several = any(len(cell.runs) > 1 for cell in matrix.cells.values())
    parts = [f"Mean ± standard deviation over the seeds {seeds}." if several else f"One seed ({seeds or 'unknown'})."]
    parts.append("Best and second are marked, rows told the true clusters (π*) left aside.")
    if any(cell.paper for cell in matrix.cells.values()):
        parts.append("Paper: the figures of arXiv 2410.03497.")
    for task in matrix.tasks:
        rounds = {run.rounds for cell in matrix.column(task) if cell.paper for run in cell.runs} - {paper_rounds(task)}
        if rounds:
            ours = ", ".join(map(str, sorted(rounds)))
            parts.append(f"{task_title(task)}: rounds {ours} here, {paper_rounds(task)} in the paper.")
    if matrix.unfinished:
        count = len(matrix.unfinished)
        parts.append(f"{count} {'run is' if count == 1 else 'runs are'} not done and not in it.")
    return " ".join(parts)


def format_spread(metric: str, spread: Spread | Figure | None, unit: str = "") -> str:
    """A mean and its deviation: accuracies in percent to a tenth, other metrics to three digits."""
    if spread is None:
        return _EMPTY
    if metric == "accuracy":
        mean, std = f"{100 * spread.mean:.1f}{unit}", None if spread.std is None else f"{100 * spread.std:.1f}"
    else:
        mean, std = f"{spread.mean:.3g}", None if spread.std is None else f"{spread.std:.1g}"
    return mean if std is None else f"{mean} ± {std}"


def places(matrix: Matrix, task: str) -> dict[str, int]:
    """The best label of a task → 1, the second → 2, where there are at least two to rank."""
    ranked = matrix.ranked(task)
    return {label: place for place, label in enumerate(ranked[:2], start=1)} if len(ranked) > 1 else {}


def _table(
    matrix: Matrix, mark: Callable[[str, int], str], plain: Callable[[str], str] = str
) -> tuple[list[str], list[list[str]]]:
    """The head, and a row per label; beside each task that the paper has, its figures."""
    head, columns = ["method"], [[row_title(label) for label in matrix.labels]]
    most = max(len(cell.runs) for cell in matrix.cells.values())
    for task in matrix.tasks:
        metric = matrix.column(task)[0].metric
        head.append(task_title(task) + (" (%)" if metric == "accuracy" else f" ({metric})"))
        best = places(matrix, task)
        cells = [matrix.cells.get((label, task)) for label in matrix.labels]
        columns.append([mark(_told(cell, most), best.get(cell.label, 0) if cell else 0) for cell in cells])
        if any(cell and cell.paper for cell in cells):
            head.append("paper")
            columns.append([plain(format_spread(metric, cell.paper if cell else None)) for cell in cells])
    columns[0] = [plain(title) for title in columns[0]]
    return [plain(title) for title in head], [list(row) for row in zip(*columns, strict=True)]


def _told(cell: Cell | None, most: int) -> str:
    if cell is None:
        return _EMPTY
    fewer = f" (n = {len(cell.runs)})" if len(cell.runs) < most else ""
    return format_spread(cell.metric, cell.spread()) + fewer


def _latex_line(cells: list[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], text)
