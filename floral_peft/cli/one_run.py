"""One method trained on one task, in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from floral_peft.cli.settings import Settings
from floral_peft.federated import ClientId, FederatedArguments, FederatedDataset, FederatedTrainer, get_method
from floral_peft.federated.checkpoint import checkpoint_rounds
from floral_peft.federated.files import write_file
from floral_peft.reports import clusters_found, plot_mixtures
from floral_peft.reports.runs import CLIENTS, MIXTURES, RECORDS, RESULT, SETTINGS, write_lines
from floral_peft.tuner import parameter_roles


DPI = 200


def new_trainer(
    settings: Settings, method: str, clients: FederatedDataset, args: FederatedArguments, lenient: bool
) -> FederatedTrainer:
    """A trainer for a method: the same clients and initial weights for each method.

    Args:
        settings: The task and the adaptors.
        method: The method's name.
        clients: The task's clients.
        args: How to train, and where.
        lenient: Take what the method can use of the settings: without a router it has no optimal routing, and where
            others are resumed it starts anew if its folder holds no checkpoint. Else what it cannot use is refused.
    """
    chosen = get_method(method)
    model = settings.task.model_for(chosen, settings.adaptors, args.seed)
    if lenient:
        folder = Path(args.output_dir)
        resume = bool(args.resume_from_checkpoint and checkpoint_rounds(folder))
        # Before its first checkpoint there is nothing to lose; what is done is not given up unasked.
        cut_off = bool(args.resume_from_checkpoint) and not resume and not (folder / RESULT).exists()
        args = replace(
            args,
            optimal_routing=args.optimal_routing and has_router(model),
            stateless=args.stateless and has_router(model),
            resume_from_checkpoint="true" if resume else None,
            overwrite_output_dir=args.overwrite_output_dir or cut_off,
        )
    task = settings.task
    return FederatedTrainer(model, args, clients, chosen, compute_metrics=task.compute_metrics, loss_fn=task.loss_fn)


def has_router(model: nn.Module) -> bool:
    """Whether clients mix adaptors in this model: one alone leaves nothing to mix."""
    held = dict(model.named_parameters())
    return any(role.kind == "router" and held[name].shape[-1] > 1 for name, role in parameter_roles(model).items())


def train_one(trainer: FederatedTrainer, settings: Settings, label: str | None = None) -> dict[str, Path]:
    """Train, evaluate, and write what belongs to a run. All processes call it; the main one writes.

    Args:
        trainer: A new trainer.
        settings: What it was made from.
        label: What the run is called in tables; by default they name it by its method and settings.

    Returns:
        What lies where, in words; nothing on other processes than the main one.
    """
    trainer.train()
    if not trainer.client_metrics:  # with eval_steps, the last round has been evaluated
        trainer.evaluate()
    mixtures = trainer.mixtures() if has_router(trainer.model) else None
    if not trainer.processes.is_main:
        return {}
    return _write_run(trainer, settings, mixtures, label)


def write_settings(folder: Path, values: dict[str, Any]) -> None:
    """Write a run's settings, as a file that `--config` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / SETTINGS, yaml.safe_dump(values, sort_keys=False).encode())


def _write_run(
    trainer: FederatedTrainer,
    settings: Settings,
    mixtures: tuple[list[ClientId], Tensor] | None,
    label: str | None,
) -> dict[str, Path]:
    """What belongs to a trained run beside its records. The result comes last: a run that has one is done."""
    folder, method = trainer.output_dir, trainer.method.name
    write_lines(folder / CLIENTS, ({"client": client, **row} for client, row in _numbers(trainer.client_metrics)))
    write_settings(folder, settings.to_dict(method, trainer.args))
    written = {"records": folder / RECORDS, "by client": folder / CLIENTS, "settings": folder / SETTINGS}
    clusters = trainer.dataset.clusters
    index = None
    kind = "adapter" if hasattr(trainer.model, "save_pretrained") else "model"
    trainer.publish(folder / kind)
    written[kind] = folder / kind
    if mixtures is not None:
        plot_mixtures(*mixtures, clusters).savefig(folder / "mixtures.png", dpi=DPI)
        rows = zip(mixtures[0], mixtures[1].tolist(), strict=True)
        known = (lambda client: {"cluster": clusters[client]}) if clusters is not None else (lambda client: {})
        write_lines(folder / MIXTURES, ({"client": one, **known(one), "mixture": row} for one, row in rows))
        index = clusters_found(*mixtures, clusters)
        written["mixtures"] = folder / "mixtures.png"
    base = settings.task.model_for(get_method("fedavg"), settings.adaptors, trainer.args.seed)
    result = {
        "label": label,
        "parameters": num_parameters(trainer.method.deployed(trainer.model)),
        "base_parameters": num_parameters(base),
        "adjusted_rand_index": index,
    }
    write_file(folder / RESULT, (json.dumps(result) + "\n").encode())
    return written


def num_parameters(model: nn.Module) -> int:
    """How many parameters a client's model has, adaptors included; its router's few are not counted."""
    roles = parameter_roles(model)
    return sum(value.numel() for name, value in model.named_parameters() if roles[name].kind != "router")


def file_name(text: str) -> str:
    """A name that every file system takes; another one for another text."""
    plain = re.sub(r"[^\w.+=-]", "-", text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _numbers(client_metrics: dict[ClientId, dict[str, float]]) -> list[tuple[ClientId, dict[str, float]]]:
    return [
        (client, {name: value for name, value in metrics.items() if not math.isnan(value)})
        for client, metrics in client_metrics.items()
    ]
