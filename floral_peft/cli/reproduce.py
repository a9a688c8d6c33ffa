"""`floral-peft reproduce`."""

from __future__ import annotations

import argparse
import re
import shutil
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from floral_peft.cli.errors import Interrupted, StrictParser, UsageError, bad_input
from floral_peft.cli.one_run import file_name, new_trainer, train_one
from floral_peft.cli.settings import Settings, read_settings
from floral_peft.cli.variants import GROUPS, Variant, read_variants
from floral_peft.federated import OutputDirInUseError
from floral_peft.federated.checkpoint import checkpoint_rounds, discard_checkpoints
from floral_peft.federated.identity import differing
from floral_peft.federated.lock import check_folder, locked
from floral_peft.federated.precision import TrainerAccelerator
from floral_peft.federated.processes import Message, Processes
from floral_peft.reports import matrix, read_runs, to_markdown, write_settings
from floral_peft.reports.runs import RESULT, SETTINGS


ERROR = "error.txt"

# What `--tasks`, `--methods`, `--seeds`, `--out` and the folders' own state say.
_OURS = {
    "task": "--tasks",
    "method": "--methods",
    "baselines": "--methods",
    "seed": "--seeds",
    "output_dir": "--out",
    "resume_from_checkpoint": None,
}
# Settings that may differ from those that a run in its folder was started with: they change none of its numbers.
_FREE = (
    "threads",
    "save_steps",
    "save_total_limit",
    "report_to",
    "disable_tqdm",
    "ddp_timeout",
    "use_cpu",
    "per_device_eval_batch_size",
    "eval_steps",
)
_POINTS = 25  # of a curve, where the task does not say how often to evaluate
_CHECKPOINTS = 10  # of a run


@dataclass(frozen=True)
class PlannedRun:
    """A cell of the matrix at one seed."""

    variant: Variant
    settings: Settings

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.settings.federated.output_dir)

    @property
    def name(self) -> str:
        """What it is called on the screen."""
        return f"{self.settings.task.name}, {self.variant.label}, seed {self.settings.federated.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Its settings, as its file holds them."""
        values = self.settings.to_dict(self.variant.method, self.settings.federated)
        read: dict[str, Any] = yaml.safe_load(yaml.safe_dump(values))
        return read


class _RefusedError(UsageError):
    """A run cannot be in its folder; all processes know."""


def reproduce(arguments: Sequence[str]) -> None:
    """Train every method on every task with every seed, skip what is done, and print the table."""
    parser = StrictParser(
        prog="floral-peft reproduce",
        usage="floral-peft reproduce --tasks A,B [--methods X,Y] [--seeds 1,2] [--out DIR] [--any_setting VALUE ...]",
        description="Train every method on every task with every seed, each in a folder of its own. What is done is "
        "skipped, what was cut off goes on, and a run that fails does not stop the others. Started twice, the two "
        "share the work. Settings of `floral-peft train` apply to all runs.",
    )
    parser.add_argument("--tasks", required=True, type=_names, metavar="A,B", help="names, as of `floral-peft tasks`")
    parser.add_argument(
        "--methods",
        type=_names,
        default=["paper"],
        metavar="X,Y",
        help="methods, each with settings of its own if need be, such as floral+budget=0.01+optimal_routing or "
        f"floral+num_adaptors=x2 (twice the task's); {' and '.join(GROUPS)} stand for the rows of the paper's tables",
    )
    parser.add_argument("--seeds", type=_numbers, default=[1, 2, 3], metavar="1,2,3", help="their numbers")
    parser.add_argument("--out", default="runs/reproduce", metavar="FOLDER", help="where the runs go")
    parser.add_argument("--list", action="store_true", help="tell the runs and how they stand, and train none")
    parser.add_argument(
        "--keep_checkpoints", action="store_true", help="keep the checkpoints and the clients' state of done runs, too"
    )
    asked, rest = parser.parse_known_args(list(arguments))
    with bad_input():
        check_folder(Path(asked.out), "out")
        _refuse_ours(rest)
        variants = read_variants(asked.methods)
        planned = [
            _plan(task, variant, seed, Path(asked.out), rest)
            for task in asked.tasks
            for seed in asked.seeds
            for variant in variants
        ]
    if asked.list:
        for run in planned:
            print(_listed(run))
        return
    failed: dict[str, str] = {}
    threads = torch.get_num_threads()
    processes = TrainerAccelerator(planned[0].settings.federated).processes
    for number, run in enumerate(planned, start=1):
        if processes.is_main:
            print(f"[{number}/{len(planned)}] {run.name}: ", end="", flush=True)
        try:
            told = _run(run, processes, asked.keep_checkpoints, threads)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(". The same command goes on with it.") from interrupt
        except Exception as error:
            if processes.count > 1 and not isinstance(error, _RefusedError):  # the others may be anywhere
                raise
            told = failed[run.name] = _note_failure(run.folder, error)
        if processes.is_main:
            print(told, flush=True)
    if not processes.is_main:
        return
    done = [run.folder for run in planned if (run.folder / RESULT).is_file()]
    if done:
        print(f"\n{to_markdown(matrix(read_runs(done)))}\n\nPictures: floral-peft report {asked.out} --html page.html")
    if failed:
        told = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise UsageError(
            f"{len(failed)} of {len(planned)} runs failed: {told}. The same command again skips what is done."
        )


def _plan(task: str, variant: Variant, seed: int, out: Path, words: list[str]) -> PlannedRun:
    """A run with all of its settings, checked."""
    folder = out / file_name(task) / file_name(variant.label) / f"seed-{seed}"
    ours = ["--task", task, "--baselines", "none", "--seed", str(seed), "--output_dir", str(folder)]
    settings = read_settings([*words, *variant.words(), *ours], many_tasks=True)
    if variant.multiplies:
        values = settings.to_dict(variant.method, settings.federated)
        settings = read_settings([*words, *variant.words(values), *ours], many_tasks=True)
    federated = settings.federated
    rounds = federated.rounds
    args = replace(
        federated,
        eval_steps=federated.eval_steps or max(1, rounds // _POINTS),
        save_steps=federated.save_steps or max(1, rounds // _CHECKPOINTS),
        save_total_limit=federated.save_total_limit or 1,
    )
    return PlannedRun(variant, replace(settings, federated=args))


def _run(run: PlannedRun, processes: Processes, keep: bool, threads: int) -> str:
    """Do a run, unless it is done.

    Args:
        run: The run.
        processes: Those that share it.
        keep: Whether its checkpoints stay when it is done.
        threads: For PyTorch's arithmetic, where neither the task nor the user says how many.

    Returns:
        What became of it, in words.
    """
    began = time.monotonic()
    with ExitStack() as stack:

        def begin() -> Message:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(run.folder.with_name(f".{run.folder.name}")))
                standing = _standing(run)
            except OutputDirInUseError:
                return ("left to another process, which trains it now", None), {}
            except UsageError as error:
                return (None, str(error)), {}
            if standing != "done":
                (run.folder / RESULT).unlink(missing_ok=True)
            if standing in ("new", "cut off"):
                write_settings(run.folder, run.to_dict())
            return (standing, None), {}

        standing, refusal = processes.on_main(begin)[0]
        if refusal is not None:
            raise _RefusedError(refusal)
        if standing not in ("new", "cut off", "goes on"):
            return str(standing)
        if processes.is_main:
            print("going on" if standing == "goes on" else "training", flush=True)
        torch.set_num_threads(run.settings.threads or threads)
        args = replace(
            run.settings.federated,
            resume_from_checkpoint="true" if standing == "goes on" else None,
            overwrite_output_dir=standing == "cut off" or run.settings.federated.overwrite_output_dir,
        )
        with bad_input():
            clients = run.settings.task.clients(args.seed)
            lenient = not run.variant.settings.keys() & {"optimal_routing", "stateless"}
            trainer = new_trainer(run.settings, run.variant.method, clients, args, lenient)
            train_one(trainer, run.settings, run.variant.label)
            processes.on_main(partial(_tidy, run.folder, keep))
    value = trainer.records[-1]
    told = f"accuracy {value['eval_accuracy']:.1%}" if "eval_accuracy" in value else f"loss {value['eval_loss']:.4g}"
    return f"  {told} after {time.monotonic() - began:.0f} s   {run.folder}"


def _standing(run: PlannedRun) -> str:
    """How a run stands: "done", "goes on" from a checkpoint, "cut off" before it had one, or "new".

    Raises:
        UsageError: Its folder holds another run.
    """
    file = run.folder / SETTINGS
    if run.settings.federated.overwrite_output_dir or not file.is_file():
        return "new"
    saved = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    done, saved_rounds = (run.folder / RESULT).is_file(), saved.get("rounds")
    asked = {name: value for name, value in run.to_dict().items() if name not in (*_FREE, "rounds")}
    if (name := differing(saved, asked)) is not None:
        raise UsageError(
            f"{run.folder} holds a run with {name}={saved[name]!r}, and {asked[name]!r} is asked for: give another "
            "--out, or give that run up by --overwrite_output_dir"
        )
    rounds = run.settings.federated.rounds
    if done and saved_rounds == rounds:
        return "done"
    trained = checkpoint_rounds(run.folder)
    if trained and max(trained) <= rounds:
        return "goes on"
    if done or trained:
        raise UsageError(
            f"{run.folder} holds a run of {saved_rounds} rounds and no checkpoint from which {rounds} can be reached: "
            "give another --out, or give that run up by --overwrite_output_dir"
        )
    return "cut off"


def _listed(run: PlannedRun) -> str:
    try:
        return f"{_standing(run):<7}   {run.folder}"
    except UsageError as error:
        return f"refused   {error}"


def _tidy(folder: Path, keep: bool) -> None:
    """A done run needs no checkpoint."""
    (folder / ERROR).unlink(missing_ok=True)
    if not keep:
        discard_checkpoints(folder, after=0)
        shutil.rmtree(folder / "private", ignore_errors=True)


def _note_failure(folder: Path, error: Exception) -> str:
    """The reason in one line; where it is more than a refusal, all of it in a file of the run's folder."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UsageError):
        return f"failed: {reason}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"failed: {type(error).__name__}: {reason[:300]}; see {folder / ERROR}"


def _refuse_ours(words: list[str]) -> None:
    for word in words:
        name = word.partition("=")[0].lstrip("-")
        if word.startswith("--") and name in _OURS:
            instead = _OURS[name]
            raise UsageError(f"--{name} is not for reproduce{'.' if instead is None else f': give {instead}.'}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    """Numbers and ranges of them: 1,2,7-9."""
    found: list[int] = []
    for name in _names(text):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", name)
        if numbers is None:
            raise argparse.ArgumentTypeError(f"{name!r} is neither a number nor a range of them, such as 1-3")
        first, last = numbers.groups()
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"there is no number in {text!r}")
    return found
