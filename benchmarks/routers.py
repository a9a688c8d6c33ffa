"""What a round costs by the way in which clients find their routers.

    python benchmarks/routers.py [--task digits ...] [--data FOLDER] [--adaptors 8] [--r 16] [--rounds 40] [--of 300]

Each task is trained by "gradient", "mirror" and "posterior", one after the other and over again, at the same number of
adaptors, rank, clients and loop; nothing is removed or compressed. Measured are the first rounds of a run of the
task's own length, unless another is given. Told are CPU times, which other processes disturb less than the wall clock,
and their ratios to "gradient": of a round at the start of the run, where mixtures are soft and clients look at most
examples (the median of the first tenth, the first round left out), and of the average round.
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
from transformers import TrainerCallback

from floral_peft import FederatedArguments, FederatedTrainer, FloralConfig
from floral_peft.federated import get_method
from floral_peft.tasks import get_task


UPDATES = ("gradient", "mirror", "posterior")


def seconds_per_round(task_name: str, update: str, given: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of a round, at the start and on average, the first one left out."""
    task = get_task(task_name).with_data(given.data if get_task(task_name).data else None)
    settings = {
        **task.settings,
        "num_adaptors": given.adaptors,
        "r": given.r,
        "budget": None,
        "eval_steps": None,
        "rounds": given.of or task.settings["rounds"],
        "router_update": update,
        "prune_adaptors": False,
        "search_adaptors": 1,
        "search_r": 1,
        "cohort": given.cohort,
        "disable_tqdm": True,
        "seed": 1,
    }
    if update != "posterior" and given.clip:
        settings["max_step_norm"] = 1.0
    known = {field.name for field in fields(FederatedArguments)}
    adaptors = FloralConfig(**{name: value for name, value in settings.items() if name not in known})
    with tempfile.TemporaryDirectory() as folder:
        chosen = {name: value for name, value in settings.items() if name in known}
        args = FederatedArguments(output_dir=folder, use_cpu=True, **chosen)
        method = get_method("floral")
        model = task.model_for(method, adaptors, args.seed)
        clock = Clock(given.rounds + 1)
        trainer = FederatedTrainer(
            model, args, task.clients(args.seed), method, loss_fn=task.loss_fn, callbacks=[clock]
        )
        trainer.train()
    seconds = clock.seconds[1:]
    return {"start": statistics.median(seconds[: max(1, given.rounds // 10)]), "average": statistics.mean(seconds)}


class Clock(TrainerCallback):
    """CPU time of each round; ends the run after so many."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A round begins."""
        self._began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A round has ended."""
        self.seconds.append(time.process_time() - self._began)
        control.should_training_stop = len(self.seconds) == self.rounds


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["digits"])
    parser.add_argument("--data")
    parser.add_argument("--adaptors", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40, help="that are measured")
    parser.add_argument("--of", type=int, help="the rounds of the run (the task's)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cohort", default="loop")
    parser.add_argument("--clip", action="store_true", help="clip the steps of all of them, as the posterior does")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for task in given.task:
        times: dict[str, list[dict[str, float]]] = {update: [] for update in UPDATES}
        for _ in range(given.repeats):
            for update in UPDATES:
                times[update].append(seconds_per_round(task, update, given))
        found[task] = {
            part: {
                update: {
                    "seconds": statistics.median(run[part] for run in runs),
                    "ratio": statistics.median(
                        run[part] / base[part] for run, base in zip(runs, times["gradient"], strict=True)
                    ),
                }
                for update, runs in times.items()
            }
            for part in ("start", "average")
        }
        print(task, json.dumps(found[task]), flush=True)
    settings = {name: value for name, value in vars(given).items() if name not in ("data",)}
    print(json.dumps({"settings": settings, "tasks": found}, indent=1))


if __name__ == "__main__":
    main()
