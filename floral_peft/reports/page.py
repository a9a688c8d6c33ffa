"""A matrix as one page of HTML that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from floral_peft.reports.figures import plot_clients, plot_cost, plot_progress
from floral_peft.reports.formats import caption, format_spread, places
from floral_peft.reports.labels import is_told_the_truth, row_title, task_title
from floral_peft.reports.matrix import Cell, Matrix
from floral_peft.reports.routing import plot_all_mixtures, plot_routers, plot_usage
from floral_peft.reports.runs import Run


DPI = 200
_LEFT_OUT = ("task", "method", "baselines", "seed", "disable_tqdm", "report_to", "save_steps", "save_total_limit")
_CAPTIONS = {
    "progress": "Over the rounds. Bands: ± one standard deviation over seeds.",
    "clients": "Over the clients, those of all seeds together; clients are compared at the same seed. The bar is from "
    "quartile to quartile, the tick the median.",
    "cost": "Against what it costs. Dotted: a method that sends nothing.",
    "mixtures": "Mixtures: a row per client, by true cluster where it is known. Rand: adjusted Rand index of the "
    "clients' main adaptors against the true clusters.",
    "usage": "Use of the adaptors by the clients of a round, at the first seed.",
    "routers": "Routers. Adaptors in use: the exponential of their usage's entropy. Mismatch: how far the weights of "
    "the adaptors' users are from those under the true clusters.",
}
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 3rem; border-bottom: 1px solid #ccc }
div.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: 1rem 0 }
thead th { border-top: 2px solid #222; border-bottom: 1px solid #222; vertical-align: bottom }
tbody tr:last-child td { border-bottom: 2px solid #222 }
th, td { padding: .25rem .7rem; text-align: right; font-weight: normal; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
b { font-weight: 650 } u { text-underline-offset: 3px }
tr.truth td, td.paper, th.paper { color: #777 }
figure { margin: 1.5rem 0 } figure img { max-width: 100%; height: auto }
figcaption, p.note { font-size: .85rem; color: #555; max-width: 46rem }
summary { cursor: pointer; color: #555; font-size: .9rem }
code { font-size: .85em }
"""


def task_figures(matrix: Matrix, task: str) -> dict[str, Figure]:
    """A task's pictures, by name; those for which its runs have the data."""
    cells = matrix.column(task)
    baselines = [cell for label in ("fedavg", "local_only") if (cell := matrix.baseline(task, label)) is not None]
    found = {
        "progress": plot_progress(cells),
        "clients": plot_clients(cells, baselines),
        "cost": plot_cost(cells),
        "mixtures": plot_all_mixtures(cells),
        "usage": plot_usage(cells),
        "routers": plot_routers(cells),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def draw(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Figures as PNG files, by name."""
    drawn = {}
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, dpi=DPI, format="png")
        drawn[name] = content.getvalue()
    return drawn


def to_html(matrix: Matrix, pictures: Mapping[str, Mapping[str, bytes]], title: str = "Runs") -> str:
    """The page: the table, then each task's details and pictures, then where each number is from.

    Args:
        matrix: The runs.
        pictures: Task → name → PNG file.
        title: Its heading.
    """
    parts = [f"<h1>{escape(title)}</h1>", _overview(matrix)]
    for task in matrix.tasks:
        parts += [f"<h2>{escape(task_title(task))}</h2>", _settings_note(matrix.column(task)), _details(matrix, task)]
        parts += [_figure(name, picture) for name, picture in pictures.get(task, {}).items()]
        parts.append(_sources(matrix.column(task)))
    if matrix.unfinished:
        folders = "".join(
            f"<li><code>{escape(str(run.folder))}</code>: round {run.rounds}" for run in matrix.unfinished
        )
        parts.append(f"<h2>Not done</h2><ul>{folders}</ul>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    page = f"<!DOCTYPE html>\n<html lang=en><head>{head}<style>\n{_STYLE}</style></head><body>\n"
    return page + "\n".join(parts) + "\n</body></html>\n"


def _overview(matrix: Matrix) -> str:
    head, with_paper = ["method"], {}
    for task in matrix.tasks:
        cells = matrix.column(task)
        head.append(f"{escape(task_title(task))}<br>{cells[0].metric}{', %' * (cells[0].metric == 'accuracy')}")
        with_paper[task] = any(cell.paper for cell in cells)
        head += ["paper"] * with_paper[task]
    rows = []
    for label in matrix.labels:
        row = [escape(row_title(label))]
        for task in matrix.tasks:
            cell = matrix.cells.get((label, task))
            row.append(_marked(matrix, cell, task))
            if with_paper[task]:
                row.append(f"<td class=paper>{format_spread(cell.metric, cell.paper) if cell else '–'}")
        rows.append((label, row))
    return _table(head, rows) + f"<p class=note>{escape(caption(matrix))}</p>"


def _details(matrix: Matrix, task: str) -> str:
    cells = matrix.column(task)
    fedavg, alone = matrix.baseline(task, "fedavg"), matrix.baseline(task, "local_only")
    head = ["method", "seeds", "rounds", cells[0].metric, "mean over<br>clients", "worst 10 %<br>of clients"]
    optional = {
        "better, worse off<br>than with FedAvg": lambda cell: _gains(cell, fedavg),
        "better, worse off<br>than alone": lambda cell: _gains(cell, alone),
        "adjusted<br>Rand index": lambda cell: format_spread("", cell.found()),
        "parameters": lambda cell: _count(cell.runs[0].result.get("parameters")),
        "MB up, down<br>per client and round": lambda cell: _traffic(cell.runs[0]),
        "seconds<br>a round": lambda cell: format_spread("", cell.of_runs(_seconds)),
    }
    columns = {name: [value(cell) for cell in cells] for name, value in optional.items()}
    columns = {name: values for name, values in columns.items() if set(values) != {"–"}}
    rows = []
    for index, cell in enumerate(cells):
        row = [
            escape(row_title(cell.label)),
            str(len(cell.runs)),
            str(cell.runs[0].rounds),
            _marked(matrix, cell, task),
        ]
        row += [format_spread(cell.metric, cell.spread(part)) for part in ("client_mean", "worst_decile")]
        rows.append((cell.label, row + [values[index] for values in columns.values()]))
    return _table([*head, *columns], rows)


def _settings_note(cells: Sequence[Cell]) -> str:
    """The settings that all of a task's runs have in common."""
    every = [run.settings for cell in cells for run in cell.runs]
    shared = {
        name: value
        for name, value in every[0].items()
        if name not in _LEFT_OUT and value not in (None, [], {}) and all(one.get(name) == value for one in every)
    }
    told = ", ".join(f"<code>{escape(name)}={escape(str(value))}</code>" for name, value in shared.items())
    return (
        f"<details><summary>Settings that all runs share</summary><p class=note>{told}</p></details>" if told else ""
    )


def _sources(cells: Sequence[Cell]) -> str:
    """Where each number is from."""
    rows = [
        (
            "",
            [
                f"<code>{escape(str(run.folder))}</code>",
                str(run.seed),
                str(run.rounds),
                f"{run.metrics.get(f'eval_{cell.metric}') or float('nan'):.6g}",
            ],
        )
        for cell in cells
        for run in cell.runs
    ]
    table = _table(["run", "seed", "rounds", cells[0].metric], rows)
    return f"<details><summary>The runs, number by number</summary>{table}</details>"


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Cells are HTML; one that begins with a tag of its own keeps it."""
    heads = "".join(f"<th{' class=paper' * (cell == 'paper')}>{cell}" for cell in head)
    body = "\n".join(
        f"<tr{' class=truth' * is_told_the_truth(label)}>"
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}" for cell in row)
        for label, row in rows
    )
    return f"<div class=wide><table><thead><tr>{heads}</thead>\n<tbody>{body}</tbody></table></div>"


def _marked(matrix: Matrix, cell: Cell | None, task: str) -> str:
    if cell is None:
        return "–"
    text = format_spread(cell.metric, cell.spread())
    return ("{}", "<b>{}</b>", "<u>{}</u>")[places(matrix, task).get(cell.label, 0)].format(text)


def _figure(name: str, picture: bytes) -> str:
    image = f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    return f"<figure>{image}<figcaption>{escape(_CAPTIONS[name])}</figcaption></figure>"


def _gains(cell: Cell, baseline: Cell | None) -> str:
    shares = cell.gained_and_lost(baseline)
    return "–" if shares is None else f"{shares[0]:.0%}, {shares[1]:.0%}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _traffic(run: Run) -> str:
    up, down = (run.last_round.get(name) for name in ("bytes_up", "bytes_down"))
    return "–" if up is None or down is None else f"{up / 1e6:.3g}, {down / 1e6:.3g}"


def _seconds(run: Run) -> float | None:
    phases = [record["seconds"] for record in run.records if record["event"] == "round" and record.get("seconds")]
    return sum(sum(one.values()) for one in phases) / len(phases) if phases else None
