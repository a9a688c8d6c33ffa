"""What a trained run leaves beside its records, for tables and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from floral_peft.federated import ClientId, FederatedTrainer
from floral_peft.federated.files import write_file
from floral_peft.reports.clusters import clusters_found
from floral_peft.reports.pictures import plot_mixtures
from floral_peft.reports.runs import CLIENTS, MIXTURES, RECORDS, RESULT, SETTINGS, write_lines
from floral_peft.tuner import FloralConfig, parameter_roles


DPI = 200
#: Settings that are no part of what was trained.
OF_ONE_RUN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")


def save_run(
    trainer: FederatedTrainer,
    label: str | None = None,
    settings: Mapping[str, Any] | None = None,
    base_parameters: int | None = None,
) -> dict[str, Path]:
    """Write into a trained run's `output_dir` what `floral-peft report` tells of it.

    ```python
    trainer.train()
    save_run(trainer)
    ```

    That is every client's metrics, the mixtures, as numbers and as a picture, and the settings. All processes call it;
    the main one writes. Clients are evaluated first, where they have not been since the training.

    Args:
        trainer: The trainer.
        label: What the run is called in tables; by default they name it by its method and settings.
        settings: Every setting by name; by default those of the trainer and the adaptors.
        base_parameters: How many parameters the model has without adaptors; by default those of no adaptor.

    Returns:
        What lies where, in words; nothing on other processes than the main one.
    """
    if not trainer.client_metrics:  # with eval_steps, the last round has been evaluated
        trainer.evaluate()
    mixtures = trainer.mixtures() if has_router(trainer.model) else None
    if not trainer.processes.is_main:
        return {}
    folder = trainer.output_dir
    write_lines(folder / CLIENTS, ({"client": client, **row} for client, row in _numbers(trainer.client_metrics)))
    write_settings(folder, _settings(trainer) if settings is None else settings)
    written = {"records": folder / RECORDS, "by client": folder / CLIENTS, "settings": folder / SETTINGS}
    clusters = trainer.dataset.clusters
    index = None
    if mixtures is not None:
        plot_mixtures(*mixtures, clusters).savefig(folder / "mixtures.png", dpi=DPI)
        rows = zip(mixtures[0], mixtures[1].tolist(), strict=True)
        known = (lambda client: {"cluster": clusters[client]}) if clusters is not None else (lambda client: {})
        write_lines(folder / MIXTURES, ({"client": one, **known(one), "mixture": row} for one, row in rows))
        index = clusters_found(*mixtures, clusters)
        written["mixtures"] = folder / "mixtures.png"
    result = {
        "label": label,
        "parameters": num_parameters(trainer.method.deployed(trainer.model)),
        "base_parameters": _of_the_base(trainer.model) if base_parameters is None else base_parameters,
        "adjusted_rand_index": index,
    }
    write_file(folder / RESULT, (json.dumps(result) + "\n").encode())  # the last: a run that has one is done
    return written


def write_settings(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a run's settings, as a file that `--config` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / SETTINGS, yaml.safe_dump(dict(values), sort_keys=False).encode())


def has_router(model: nn.Module) -> bool:
    """Whether clients mix adaptors in this model: one alone leaves nothing to mix."""
    held = dict(model.named_parameters())
    return any(role.kind == "router" and held[name].shape[-1] > 1 for name, role in parameter_roles(model).items())


def num_parameters(model: nn.Module) -> int:
    """How many parameters a client's model has, adaptors included; its router's few are not counted."""
    roles = parameter_roles(model)
    return sum(value.numel() for name, value in model.named_parameters() if roles[name].kind != "router")


def _of_the_base(model: nn.Module) -> int | None:
    """None for a model that is adaptors all through, as an ensemble."""
    roles = parameter_roles(model)
    return sum(value.numel() for name, value in model.named_parameters() if roles[name].kind == "base") or None


def _settings(trainer: FederatedTrainer) -> dict[str, Any]:
    adaptors = getattr(trainer.model, "active_peft_config", None)
    names = [item.name for item in dataclasses.fields(FloralConfig)] if isinstance(adaptors, FloralConfig) else []
    own = {name: value for name in names if type(value := getattr(adaptors, name)) in (bool, str, int, float)}
    args = {name: value for name, value in trainer.args.to_dict().items() if name not in OF_ONE_RUN}
    return {"method": trainer.method.name, **args, **own}


def _numbers(client_metrics: Mapping[ClientId, Mapping[str, float]]) -> list[tuple[ClientId, dict[str, float]]]:
    return [
        (client, {name: value for name, value in metrics.items() if not math.isnan(value)})
        for client, metrics in client_metrics.items()
    ]
