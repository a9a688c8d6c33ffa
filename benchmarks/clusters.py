"""Whether routers find the clusters: learned against true routing, and against one model for all.

    python benchmarks/clusters.py --tasks digits,digits-label-shift --seeds 42,43 --json FILE
    python benchmarks/clusters.py --tasks mnist-label-shift-reduced --case unequal --data FOLDER -- --rounds 300

Everything is at the defaults of the task and the package but for what stands behind `--`, which is read as by
`floral-peft train`. Methods are written as for `floral-peft reproduce`. Cases:

    plain     the task as it is
    unequal   300 clients of MNIST in clusters of 60, 25, 10 and 5 % of them
    alike     25 clients of digits that do not differ
    moving    half-way a quarter of the clients change places with a client of the next cluster
    norm      the net of digits with a batch norm
    inverted, swapped, shuffled, darker, leaning
              digits whose clusters differ in something else than the tasks': every other sees black as white, or calls
              threes eights; each but one sees about a quarter of the pixels in other places; each has another
              brightness, or leans by another multiple of 20 degrees
    two-labels, five-labels, dirichlet-0.1, dirichlet-0.5
              20 clients of digits that hold other labels: so many each, or each label dealt out in Dirichlet(0.1) or
              (0.5) proportions; there are no clusters, nor a Rand index

Prints a line per run and appends it to --json, which then holds a list: the accuracy (regression: the squared error)
over all and by cluster, the adjusted Rand index, how many adaptors are left; and of clients that moved the accuracy
and the share that has its cluster's adaptor, after each participation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import TrainerCallback

from floral_peft import FederatedDataset, FederatedTrainer
from floral_peft.cli.one_run import new_trainer
from floral_peft.cli.settings import Settings, read_settings
from floral_peft.cli.variants import read_variants
from floral_peft.reports import clusters_found, has_router
from floral_peft.tasks.changes import Change, turned
from floral_peft.tasks.digits import digits_clients
from floral_peft.tasks.images import ImageClients
from floral_peft.tasks.tables import as_dataset


#: Which cluster each twentieth of the clients is of.
UNEQUAL = [0] * 12 + [1] * 5 + [2] * 2 + [3]
ALIKE = 25


def inverted(images: Tensor, labels: Tensor, cluster: int) -> tuple[Tensor, Tensor]:
    """Every other cluster sees black as white."""
    return (1 - images if cluster % 2 else images), labels


def swapped(images: Tensor, labels: Tensor, cluster: int) -> tuple[Tensor, Tensor]:
    """Every other cluster calls threes eights, and eights threes."""
    names = torch.arange(10)
    names[[3, 8]] = torch.tensor([8, 3] if cluster % 2 else [3, 8])
    return images, names[labels]


def shuffled(images: Tensor, labels: Tensor, cluster: int) -> tuple[Tensor, Tensor]:
    """Each cluster but the first sees about a quarter of the pixels, others each, in other places."""
    places, drawn = torch.arange(64), torch.Generator().manual_seed(100 + cluster)
    if cluster:
        some = torch.randperm(64, generator=drawn)[:16]
        places[some] = some[torch.randperm(16, generator=drawn)]
    return images.flatten(1)[:, places].view_as(images), labels


def darker(images: Tensor, labels: Tensor, cluster: int) -> tuple[Tensor, Tensor]:
    """Each cluster sees images of another brightness."""
    return images * (0.25 + 0.25 * cluster), labels


def leaning(images: Tensor, labels: Tensor, cluster: int) -> tuple[Tensor, Tensor]:
    """Each cluster sees images turned by another 20 degrees."""
    return turned(images, 20.0 * cluster), labels


CHANGES: dict[str, Change] = {
    "inverted": inverted,
    "swapped": swapped,
    "shuffled": shuffled,
    "darker": darker,
    "leaning": leaning,
}


class StopAfter(TrainerCallback):
    """Ends a training after a round, so that it can be gone on with."""

    def __init__(self, round: int) -> None:
        self._round = round

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop |= state.global_step == self._round
        return control


def unequal(settings: Settings, seed: int) -> FederatedDataset:
    """The clients of an image task, in clusters of unequal sizes."""
    made: Any = settings.task.clients  # with its data chosen: a partial
    images: ImageClients = made.func
    change: Change = images.change
    twenty = replace(images, clusters=20, change=lambda inputs, labels, c: change(inputs, labels, UNEQUAL[c]))
    clients = twenty(seed, **made.keywords)
    return FederatedDataset({k: clients[k] for k in clients}, clusters={k: UNEQUAL[k % 20] for k in clients})


#: How labels are dealt out to clients where these differ in nothing else.
SKEWED: dict[str, dict[str, Any]] = {
    "two-labels": {"scheme": "labels", "labels_per_client": 2},
    "five-labels": {"scheme": "labels", "labels_per_client": 5},
    "dirichlet-0.1": {"scheme": "dirichlet", "alpha": 0.1, "min_examples": 6},
    "dirichlet-0.5": {"scheme": "dirichlet", "alpha": 0.5, "min_examples": 6},
}


def flat_digits() -> dict[str, np.ndarray]:
    """All digits, as the task has them."""
    digits = load_digits()
    return {"inputs": digits.images.reshape(len(digits.target), -1).astype("float32") / 16, "labels": digits.target}


def alike(seed: int) -> FederatedDataset:
    """Digits dealt out to clients, all of one cluster."""
    inputs, labels = flat_digits().values()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    clients = {}
    for client, rows in enumerate(order.tensor_split(ALIKE)):
        held = as_dataset({"inputs": inputs[rows], "labels": labels[rows]})
        tests = round(0.3 * len(rows))
        clients[client] = DatasetDict(train=held.select(range(tests, len(rows))), test=held.select(range(tests)))
    return FederatedDataset(clients, clusters=dict.fromkeys(clients, 0))


def clients_of(settings: Settings, case: str, seed: int) -> FederatedDataset:
    """The clients of a case; those of the task, if it is about something else."""
    if case == "unequal":
        return unequal(settings, seed)
    if (case == "alike" or case in CHANGES or case in SKEWED) and not settings.task.name.startswith("digits"):
        raise SystemExit(f"--case {case} is of digits: --tasks digits.")
    if case in SKEWED and settings.federated.optimal_routing:
        raise SystemExit(f"--case {case} has no clusters that routers could be told: --methods floral,fedavg.")
    if case == "alike":
        return alike(seed)
    if case in SKEWED:
        return FederatedDataset.from_partition(as_dataset(flat_digits()), 20, test_size=0.3, seed=seed, **SKEWED[case])
    if case in CHANGES:
        clients = digits_clients(seed, CHANGES[case])
        kinds = 2 if case in ("inverted", "swapped") else 4
        return FederatedDataset({k: clients[k] for k in clients}, clusters={k: k % kinds for k in clients})
    return settings.task.clients(seed)


def normed_model() -> nn.Module:
    """The net of digits with a batch norm."""
    hidden, norm, output = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 10)
    return nn.Sequential(OrderedDict(hidden=hidden, norm=norm, relu=nn.ReLU(), output=output))


def moved(clients: FederatedDataset) -> tuple[FederatedDataset, list[int]]:
    """The clients after two of each eight have changed places, and those two: of clusters that follow one another.

    Of four clusters each thus loses a quarter of its clients, and gets as many others.
    """
    places = {client: client for client in clients}
    for block in range(0, len(clients) - 7, 8):
        first = block + block // 8 % 4
        places |= {first: first + 1, first + 1: first}
    known = clients.clusters or {}
    now = FederatedDataset({k: clients[places[k]] for k in clients}, clusters={k: known[places[k]] for k in clients})
    return now, [k for k in clients if places[k] != k]


def found(trainer: FederatedTrainer) -> dict[str, Any]:
    """What a trained run is worth."""
    summary = trainer.evaluate()
    metric = "eval_accuracy" if "eval_accuracy" in summary else "eval_loss"
    clusters = trainer.dataset.clusters
    by_cluster: dict[int, list[float]] = {}
    for client, metrics in trainer.client_metrics.items():
        by_cluster.setdefault(clusters[client] if clusters else 0, []).append(metrics[metric])
    row = {
        metric.removeprefix("eval_"): summary[metric],
        "by_cluster": {c: sum(values) / len(values) for c, values in sorted(by_cluster.items())},
    }
    if has_router(trainer.model) and clusters is not None:
        row["rand"] = clusters_found(*trainer.mixtures(), clusters)
    rounds = [record for record in trainer.records if record["event"] == "round"]
    return row | {"adaptors": len(rounds[-1]["adaptors"]), "rounds": len(rounds)}


def at_home(trainer: FederatedTrainer, clients: list[int]) -> dict[str, float]:
    """Of some clients: the share that uses the adaptor of most of its cluster, and the accuracy."""
    ids, mixtures = trainer.mixtures()
    best = dict(zip(ids, mixtures.argmax(dim=1).tolist(), strict=True))
    clusters = trainer.dataset.clusters or {}
    members = {c: [best[k] for k in ids if clusters[k] == c and k not in clients] for c in set(clusters.values())}
    home = {c: max(set(chosen), key=chosen.count) for c, chosen in members.items()}
    trainer.evaluate()
    accuracy = [trainer.client_metrics[k]["eval_accuracy"] for k in clients]
    return {
        "at_home": sum(best[k] == home[clusters[k]] for k in clients) / len(clients),
        "accuracy": sum(accuracy) / len(accuracy),
    }


@contextmanager
def trained(settings: Settings, method: str, clients: FederatedDataset, case: str) -> Iterator[dict[str, Any]]:
    """The figures of a run."""
    args = settings.federated
    if case == "norm":
        settings = replace(settings, task=replace(settings.task, model=normed_model))
    with tempfile.TemporaryDirectory() as folder:
        args = replace(args, output_dir=folder, eval_steps=None, disable_tqdm=True)
        if case != "moving":
            trainer = new_trainer(settings, method, clients, args, lenient=True)
            trainer.train()
            yield found(trainer)
            return
        half = args.rounds // 2
        each = round(len(clients) / args.cohort_size(len(clients)))  # rounds in which each takes part once
        stops = [half, *(half + n * each for n in range(1, 6)), args.rounds]
        rows = []
        now, changed = moved(clients)
        for stop in stops:
            data = clients if stop == half else now
            args = replace(args, save_steps=args.rounds, resume_from_checkpoint="true")
            trainer = new_trainer(settings, method, data, args, lenient=True)
            trainer.callback_handler.add_callback(StopAfter(stop))
            trainer.train()
            rows.append({"round": stop, **at_home(trainer, changed)})
        yield found(trainer) | {"moved": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="digits")
    parser.add_argument("--methods", default="floral,floral+optimal_routing")
    parser.add_argument("--seeds", default="42")
    parser.add_argument(
        "--case", default="plain", choices=("plain", "unequal", "alike", "moving", "norm", *CHANGES, *SKEWED)
    )
    parser.add_argument("--data", help="folder of the tasks' datasets")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    for task in given.tasks.split(","):
        for seed in given.seeds.split(","):
            for variant in read_variants(given.methods.split(",")):
                words = ["--task", task, "--seed", seed, *(["--data", given.data] if given.data else [])]
                settings = read_settings([*words, *variant.words(), *given.settings], many_tasks=True)
                clients = clients_of(settings, given.case, int(seed))
                began = time.process_time()
                with trained(settings, variant.method, clients, given.case) as row:
                    seconds = round(time.process_time() - began)
                    row = {"task": task, "case": given.case, "seed": int(seed), "method": variant.label, **row}
                    row |= {"settings": " ".join(given.settings), "cpu_seconds": seconds}
                print(json.dumps(row), flush=True)
                if given.json is not None:
                    rows = json.loads(given.json.read_text()) if given.json.is_file() else []
                    given.json.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
