"""Whether routers find the clusters of few clients with few examples: learned against true routing.

    python benchmarks/few_clients.py --seeds 1,2,3,4 --json FILE

Digits of scikit-learn in four clusters, turned or with shifted labels: the net of the task `digits`, trained with its
adaptors, or frozen after training on other digits. FLoRAL gets a bound of six adaptors, and the package's defaults.
Prints a line per population with accuracy, adjusted Rand index and the adaptors left, by seed, and the means.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import nn

from floral_peft import FederatedArguments, FederatedDataset, FederatedTrainer, FloralConfig
from floral_peft.reports import clusters_found
from floral_peft.tasks.changes import rotate, shift_labels
from floral_peft.tasks.digits import digits_model


CLUSTERS = 4
#: So many digits are the clients'; the frozen nets have seen the others.
CLIENTS_DIGITS = 1200
TESTS = 60
CHANGES = {"rotate": rotate, "label-shift": shift_labels}


class Population(NamedTuple):
    """How many clients there are, of how many training examples each, and whether their base is frozen."""

    frozen: bool
    clients: int
    examples: int


POPULATIONS = [
    Population(True, 12, 40),
    Population(True, 12, 20),
    Population(True, 8, 60),
    Population(False, 12, 40),
    Population(False, 24, 10),
    Population(False, 40, 12),
]


def digits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels, shuffled."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(bunch.images, dtype=torch.float32)[order] / 16, torch.tensor(bunch.target)[order]


def clients(population: Population, change: str, seed: int) -> FederatedDataset:
    """Client k is of cluster k mod 4; up to 60 examples beside its own are for testing."""
    images, labels = digits(seed)
    each = CLIENTS_DIGITS // population.clients
    found = {}
    for k in range(population.clients):
        rows = slice(k * each, k * each + min(each, population.examples + TESTS))
        inputs, targets = CHANGES[change](images[rows], labels[rows], k % CLUSTERS)
        held = Dataset.from_dict({"inputs": inputs.flatten(1).numpy(), "labels": targets.numpy()}).with_format("torch")
        found[k] = DatasetDict(
            train=held.select(range(population.examples)), test=held.select(range(population.examples, len(held)))
        )
    return FederatedDataset(found, clusters={k: k % CLUSTERS for k in found})


def frozen_net(seed: int) -> nn.Module:
    """The net after training on digits that no client has, upright and under their own names."""
    torch.manual_seed(seed)
    net = digits_model()
    images, labels = (tensor[CLIENTS_DIGITS:] for tensor in digits(seed))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images.flatten(1)), labels).backward()
        optimizer.step()
    return net.requires_grad_(False)


def run(population: Population, change: str, seed: int, optimal_routing: bool) -> dict[str, Any]:
    """Accuracy, Rand index and the adaptors that are left."""
    torch.manual_seed(seed)
    frozen = population.frozen
    adaptors: dict[str, Any] = {"r": 4, "shared_r": 4, "rank_pattern": {"output": 10}} if frozen else {"r": 8}
    config = FloralConfig(
        num_adaptors=CLUSTERS if optimal_routing else 6,
        target_modules=["hidden", "output"],
        train_base=not frozen,
        **adaptors,
    )
    settings: dict[str, Any] = {"rounds": 60, "per_device_train_batch_size": 16, "learning_rate": 0.4}
    if frozen:
        settings = {"rounds": 30, "per_device_train_batch_size": 10, "learning_rate": 5e-3}
        settings |= {"optimizer": "adamw", "precondition": False}
    data = clients(population, change, seed)
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedArguments(
            folder,
            seed=seed,
            optimal_routing=optimal_routing,
            cohort="vectorized",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        model = get_peft_model(frozen_net(seed) if frozen else digits_model(), config)
        trainer = FederatedTrainer(model, args, data, method="floral", loss_fn=nn.functional.cross_entropy)
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
        ids, mixtures = trainer.mixtures()
    rand = clusters_found(ids, mixtures, data.clusters or {})
    return {"accuracy": accuracy, "rand": rand, "adaptors": mixtures.shape[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3,4")
    parser.add_argument("--routing", default="learned,true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.disable(logging.WARNING)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    rows: list[dict[str, Any]] = []
    for routing in given.routing.split(","):
        for population in POPULATIONS:
            for change in CHANGES:
                found = [run(population, change, seed, routing == "true") for seed in seeds]
                case = {"routing": routing, "change": change, **population._asdict()}
                rows += [case | {"seed": seed} | result for seed, result in zip(seeds, found, strict=True)]
                told = "  ".join(f"{one['accuracy']:.3f} ({one['rand']:.2f}, {one['adaptors']})" for one in found)
                base = "frozen" if population.frozen else "trained"
                print(
                    f"{routing:8}{base:8}{change:12}{population.clients} x {population.examples}: {told}", flush=True
                )
        of_it = [row for row in rows if row["routing"] == routing]
        print(f"{routing}: {mean(r['accuracy'] for r in of_it):.3f}, rand {mean(r['rand'] for r in of_it):.2f}")
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
