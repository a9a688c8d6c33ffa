"""`floral-peft report`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from floral_peft.cli.errors import StrictParser, UsageError, bad_input
from floral_peft.cli.one_run import file_name
from floral_peft.reports import (
    DPI,
    FORMATS,
    Run,
    adaptors_in_words,
    common_metric,
    comparison,
    draw,
    matrix,
    plot_curves,
    read_run,
    read_runs,
    task_figures,
    to_html,
)


def report(arguments: Sequence[str]) -> None:
    """Print a table of runs, a row each, or with `--format` over their seeds; draw curves, pictures, a page."""
    parser = StrictParser(
        prog="floral-peft report",
        description="Turn runs into a table: rounds, accuracy, mean over clients, worst 10 % of clients, "
        "and how many clients gained and lost against a baseline. With --format, --html or --pictures: methods by "
        "tasks, mean ± standard deviation over seeds.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder that holds several")
    parser.add_argument(
        "--baseline", metavar="RUN", help="the run to compare clients with; the only fedavg by default"
    )
    parser.add_argument("--metric", help="accuracy, loss, ...; accuracy by default, where every run measured it")
    parser.add_argument("--curves", metavar="FILE.png", help="draw the metric over the rounds into this file")
    parser.add_argument("--format", choices=list(FORMATS), help="print methods by tasks, over seeds, in this form")
    parser.add_argument(
        "--html", metavar="FILE.html", help="write a page with the table and all pictures into this file"
    )
    parser.add_argument("--pictures", metavar="FOLDER", help="write all pictures into this folder")
    asked, rest = parser.parse_known_args(list(arguments))
    parser.refuse(rest)
    with bad_input():
        runs = read_runs(asked.runs)
        if asked.format or asked.html or asked.pictures:
            _tell_matrix(asked, runs)
            return
        baseline = read_run(asked.baseline) if asked.baseline else _only_fedavg(runs)
        metric = asked.metric or common_metric(runs)
        print(comparison(runs, baseline, metric))
        for run in runs:
            if (words := adaptors_in_words(run)) is not None:
                print(f"\n{run.folder}: {words}")
        if asked.curves:
            plot_curves(runs, metric).savefig(asked.curves, dpi=DPI)
            print(f"\n{metric} by round   {asked.curves}")


def _tell_matrix(asked: Namespace, runs: Sequence[Run]) -> None:
    for option in ("baseline", "curves"):
        if getattr(asked, option):
            raise UsageError(f"--{option} is for single runs: leave out --format, --html and --pictures.")
    found = matrix(runs, asked.metric)
    print(FORMATS[asked.format or "markdown"](found))
    if not asked.pictures and not asked.html:
        return
    pictures = {task: draw(task_figures(found, task)) for task in found.tasks}
    files: dict[Path, bytes] = {}
    if asked.pictures:
        names = {file_name(task): drawn for task, drawn in pictures.items()}
        for task, drawn in names.items():
            files |= {Path(asked.pictures, f"{task}-{name}.png"): content for name, content in drawn.items()}
    if asked.html:
        files[Path(asked.html)] = to_html(found, pictures, title=", ".join(asked.runs)).encode()
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(path, file=sys.stderr)


def _only_fedavg(runs: Sequence[Run]) -> Run | None:
    found = [run for run in runs if run.method == "fedavg"]
    return found[0] if len(found) == 1 else None
