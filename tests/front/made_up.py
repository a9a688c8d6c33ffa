"""Runs that nobody trained, as `floral-peft reproduce` would have written them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml


def write_run(
    folder: Path,
    label: str,
    task: str = "mnist-rotate",
    seed: int = 1,
    accuracy: float = 0.9,
    clients: int = 12,
    rounds: int = 20,
    adaptors: int = 0,
    found: float = 1.0,
    metric: str = "accuracy",
    **settings: Any,
) -> Path:
    """Write a run whose metric rises to `accuracy`, or for a loss falls to it.

    Args:
        folder: A new folder.
        label: Its row.
        task: Its column.
        seed: Its seed.
        accuracy: The metric after the last round; a client's is up to 0.05 from it.
        clients: How many there are, in four clusters.
        rounds: How many there were.
        adaptors: C; 0 for a method without routers.
        found: How far the routers have come to the true clusters, from 0 to 1.
        metric: What is measured beside the loss.
        settings: More of them.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    method = label.split("+")[0]
    records: list[dict[str, Any]] = []
    for at in range(1, rounds + 1):
        done = 1 - np.exp(-4 * at / rounds)
        shares = (1 - found * done) / max(1, adaptors) + found * done * np.array(
            [0.25] * 4 + [0.0] * max(0, adaptors - 4)
        )
        record = {"event": "round", "round": at, "train_loss": 1.0, "clients_trained": 3, "seconds": {"train": 0.1}}
        sent = 0 if method == "local_only" else 600_000 * (1 + adaptors // 4)
        record |= {"bytes_up": sent, "bytes_down": sent, "clients_dropped": {}}
        if adaptors:
            usage = np.abs(shares[:adaptors] + rng.normal(0, 0.03, adaptors))
            entropy = (1 - found * done) * float(np.log(adaptors))
            record |= {
                "usage": (usage / usage.sum()).tolist(),
                "router_entropy": entropy,
                "mismatch": 1.5 - done * found,
            }
        records.append(record)
        if at % 2 == 0:
            value = accuracy * (0.3 + 0.7 * done) if metric == "accuracy" else accuracy + (1 - done) ** 2
            value += rng.normal(0, 0.004) * accuracy
            worst = value - 0.08 if metric == "accuracy" else 2 * value
            told = {"": value, "_client_mean": value, "_worst_decile": worst}
            records.append(
                {"event": "evaluate", "round": at} | {f"eval_{metric}{part}": v for part, v in told.items()}
            )
    if records:
        records[-1] |= {f"eval_{metric}{part}": accuracy for part in ("", "_client_mean")}
    _write_lines(folder / "records.jsonl", records)
    told_settings = {"task": task, "method": method, "seed": seed, "rounds": rounds, "learning_rate": 0.1, **settings}
    told_settings["optimal_routing"] = "optimal_routing" in label
    (folder / "settings.yaml").write_text(yaml.safe_dump(told_settings))
    values = accuracy + rng.uniform(-0.05, 0.05, clients)
    rows = [{"client": k, f"eval_{metric}": v, "num_examples": 9} for k, v in enumerate(values.tolist())]
    _write_lines(folder / "client_metrics.jsonl", rows)
    result: dict[str, Any] = {"label": label, "parameters": 159_010 + 20_000 * adaptors, "base_parameters": 159_010}
    if adaptors:
        weights = rng.dirichlet([0.5] * adaptors, clients) * (1 - found)
        weights[np.arange(clients), np.arange(clients) % 4 % adaptors] += found
        mixtures = [{"client": k, "cluster": k % 4, "mixture": row} for k, row in enumerate(weights.tolist())]
        _write_lines(folder / "mixtures.jsonl", mixtures)
        result["adjusted_rand_index"] = found
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
