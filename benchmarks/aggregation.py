"""Averaging adaptors factor by factor, or as the matrices that they are: how much it matters, by local epochs.

    python benchmarks/aggregation.py --data FOLDER

Both aggregations train the same models on the same clients, with true routing, so that nothing but the aggregation
differs. Prints a line per run and writes all of them to --json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import fields
from typing import Any

import torch

from floral_peft import FederatedArguments, FederatedTrainer, FloralConfig
from floral_peft.federated import get_method
from floral_peft.tasks import get_task


def run(task_name: str, data: str | None, seed: int, **changes: Any) -> dict[str, Any]:
    """One training; its accuracy, its mean truncation and its seconds."""
    task = get_task(task_name).with_data(data)
    settings = {**task.settings, "eval_steps": None, "router_noise": 0.0, "optimal_routing": True, **changes}
    known = {field.name for field in fields(FederatedArguments)}
    adaptors = FloralConfig(**{name: value for name, value in settings.items() if name not in known})
    method = get_method("floral")
    with tempfile.TemporaryDirectory() as folder:
        own = {name: value for name, value in settings.items() if name in known}
        args = FederatedArguments(output_dir=folder, seed=seed, disable_tqdm=True, use_cpu=True, **own)
        model = task.model_for(method, adaptors, seed)
        trainer = FederatedTrainer(model, args, task.clients(seed), method=method, loss_fn=task.loss_fn)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        accuracy = trainer.evaluate()["eval_accuracy"]
        reduce = statistics.mean(
            record["seconds"]["reduce"]
            for record in trainer.records
            if "seconds" in record and record["event"] == "round"
        )
        lost = [record["truncation"] for record in trainer.records if record.get("truncation") is not None]
    return {
        "accuracy": accuracy,
        "truncation": statistics.mean(lost) if lost else None,
        "seconds": seconds,
        "reduce_seconds": reduce,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mnist-rotate-reduced")
    parser.add_argument("--data", help="folder of the task's dataset, or a folder of such folders")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for budget in given.budgets:
        for epochs in given.epochs:
            for seed in given.seeds:
                for aggregation in ("factors", "product"):  # side by side, so that both see the same machine
                    found = run(
                        given.task,
                        given.data,
                        seed,
                        rounds=given.rounds,
                        local_epochs=epochs,
                        budget=budget,
                        adaptor_aggregation=aggregation,
                    )
                    told = {"budget": budget, "local_epochs": epochs, "seed": seed, "aggregation": aggregation}
                    rows.append({"task": given.task, "rounds": given.rounds, **told, **found})
                    print(json.dumps(rows[-1]), flush=True)
                    if given.json:
                        with open(given.json, "w", encoding="utf-8") as file:
                            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
