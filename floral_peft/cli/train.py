"""`floral-peft train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from floral_peft.cli.errors import Interrupted, bad_input
from floral_peft.cli.one_run import new_trainer, train_one
from floral_peft.cli.settings import Settings, read_settings
from floral_peft.federated import FederatedDataset, FederatedTrainer
from floral_peft.federated.checkpoint import checkpoint_rounds
from floral_peft.reports import DPI, common_metric, comparison, plot_curves, read_run


def train(arguments: Sequence[str]) -> None:
    """Train a method and its baselines on the same clients and initial weights, compare them, say what lies where."""
    with bad_input():
        settings = read_settings(arguments)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        clients = settings.task.clients(settings.federated.seed)
        trainers = {method: build_trainer(settings, method, clients) for method in settings.methods}
        is_main = trainers[settings.methods[0]].processes.is_main  # the only process that writes and prints
        if is_main:
            print(f"{settings.task.name}: {settings.task.summary}.")
        written: dict[str, Path] = {}
        for method, trainer in trainers.items():
            if is_main:
                print(f"\nTraining {method} in {trainer.output_dir}", flush=True)
            try:
                files = train_one(trainer, settings)
            except KeyboardInterrupt as interrupt:
                raise Interrupted(_how_to_go_on(arguments, trainers.values())) from interrupt
            written |= {f"{method} {what}": path for what, path in files.items()}
        if not is_main:
            return
        runs = [read_run(trainer.output_dir) for trainer in trainers.values()]
        metric = common_metric(runs)
        if settings.federated.eval_steps is not None:
            written[f"{metric} by round"] = Path(settings.federated.output_dir, f"{metric}.png")
            plot_curves(runs, metric).savefig(written[f"{metric} by round"], dpi=DPI)
    print(f"\n{comparison(runs, runs[1] if len(runs) > 1 else None, metric)}\n")
    for run in runs:
        if (index := run.result.get("adjusted_rand_index")) is not None:
            print(f"{run.method}'s routers against the true clusters: adjusted Rand index {index:.2f}\n")
    width = max(map(len, written))
    print("\n".join(f"{what:<{width}}   {path}" for what, path in written.items()))


def _how_to_go_on(arguments: Sequence[str], trainers: Iterable[FederatedTrainer]) -> str:
    """What an interrupted user is told. Flags that come twice count as the last of them says."""
    folder = next(iter(trainers)).output_dir
    if not checkpoint_rounds(folder):
        return ", and there is no checkpoint yet to go on from: --save_steps N makes one after every N rounds."
    flags = ["--output_dir", str(folder.parent), "--resume_from_checkpoint", "true"]
    return f". Go on with it: {shlex.join(['floral-peft', 'train', *arguments, *flags])}"


def build_trainer(settings: Settings, method: str, clients: FederatedDataset) -> FederatedTrainer:
    """A trainer for one of the methods: the same clients and initial weights for each, a folder of its own.

    A baseline takes what it can use of the settings: without a router it has no optimal routing, and without a
    checkpoint in its folder it starts at round 0.
    """
    args = replace(settings.federated, output_dir=str(Path(settings.federated.output_dir, method)))
    return new_trainer(settings, method, clients, args, lenient=method != settings.methods[0])
