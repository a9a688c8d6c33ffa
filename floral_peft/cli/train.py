"""`floral-peft train`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from floral_peft.cli.errors import bad_input
from floral_peft.cli.settings import Settings, read_settings
from floral_peft.federated import ClientId, FederatedDataset, FederatedTrainer, get_method
from floral_peft.federated.checkpoint import checkpoint_rounds
from floral_peft.reports import clusters_found, common_metric, comparison, plot_curves, plot_mixtures, read_run
from floral_peft.reports.runs import CLIENTS, RECORDS, SETTINGS, write_lines
from floral_peft.tuner import parameter_roles


DPI = 200


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
        found: dict[str, float] = {}
        for method, trainer in trainers.items():
            if is_main:
                print(f"\nTraining {method}", flush=True)
            trainer.train()
            if not trainer.client_metrics:  # with eval_steps, the last round has been evaluated
                trainer.evaluate()
            mixtures = trainer.mixtures() if has_router(trainer.model) else None
            if is_main:
                files = write_run(trainer, settings.to_dict(method, trainer.args), mixtures)
                written |= {f"{method} {what}": path for what, path in files.items()}
            index = None if mixtures is None else clusters_found(*mixtures, clients.clusters)
            if index is not None:
                found[method] = index
        if not is_main:
            return
        runs = [read_run(trainer.output_dir) for trainer in trainers.values()]
        metric = common_metric(runs)
        if settings.federated.eval_steps is not None:
            written[f"{metric} by round"] = Path(settings.federated.output_dir, f"{metric}.png")
            plot_curves(runs, metric).savefig(written[f"{metric} by round"], dpi=DPI)
    print(f"\n{comparison(runs, runs[1] if len(runs) > 1 else None, metric)}\n")
    for method, index in found.items():
        print(f"{method}'s routers against the true clusters: adjusted Rand index {index:.2f}\n")
    width = max(map(len, written))
    print("\n".join(f"{what:<{width}}   {path}" for what, path in written.items()))


def build_trainer(settings: Settings, method: str, clients: FederatedDataset) -> FederatedTrainer:
    """A trainer for one of the methods: the same clients and initial weights for each, a folder of its own.

    A baseline takes what it can use of the settings: without a router it has no optimal routing, and without a
    checkpoint in its folder it starts at round 0.
    """
    chosen = get_method(method)
    model = settings.task.model_for(chosen, settings.adaptors, settings.federated.seed)
    args = replace(settings.federated, output_dir=str(Path(settings.federated.output_dir, method)))
    if method != settings.methods[0]:
        resume = args.resume_from_checkpoint and checkpoint_rounds(Path(args.output_dir))
        args = replace(
            args,
            optimal_routing=args.optimal_routing and has_router(model),
            stateless=args.stateless and has_router(model),
            resume_from_checkpoint="true" if resume else None,
        )
    return FederatedTrainer(model, args, clients, chosen, loss_fn=settings.task.loss_fn)


def has_router(model: nn.Module) -> bool:
    """Whether clients mix adaptors in this model."""
    return any(role.kind == "router" for role in parameter_roles(model).values())


def write_run(
    trainer: FederatedTrainer, settings: dict[str, object], mixtures: tuple[list[ClientId], Tensor] | None
) -> dict[str, Path]:
    """Write what belongs to a trained run beside its records, and say what lies where.

    Args:
        trainer: It has trained and evaluated.
        settings: Its settings.
        mixtures: The clients' ids and mixtures, for a model with routers.
    """
    folder = trainer.output_dir
    rows = [
        {"client": client, **{name: value for name, value in metrics.items() if not math.isnan(value)}}
        for client, metrics in trainer.client_metrics.items()
    ]
    write_lines(folder / CLIENTS, rows)
    (folder / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    written = {"records": folder / RECORDS, "by client": folder / CLIENTS, "settings": folder / SETTINGS}
    if mixtures is not None:
        trainer.publish(folder / "adapter")
        plot_mixtures(*mixtures, trainer.dataset.clusters).savefig(folder / "mixtures.png", dpi=DPI)
        written |= {"adapter": folder / "adapter", "mixtures": folder / "mixtures.png"}
    else:
        trainer.publish(folder / "model")
        written["model"] = folder / "model"
    return written
