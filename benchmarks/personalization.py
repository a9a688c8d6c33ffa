"""Clients that took no part in training: accuracy against the number of their examples.

    python benchmarks/personalization.py [--task digits ...] [--data FOLDER] [--seeds 1 2 3]

Every fifth client of the task is left out of training. Then each gets a model from a few of its examples, and is
tested on its test examples: the uniform mixture, which asks for none; the router found by `trainer.personalize`, with
and without labels; everything fine-tuned on these examples alone, for as many epochs as turn out best on the test
examples (which favours it); and the true cluster's adaptor. Training is with true routing (or --router_update
posterior), so what is compared is what one does with the adaptors, not how they came about.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset

from floral_peft import FederatedArguments, FederatedDataset, FederatedTrainer, FloralConfig
from floral_peft.federated import get_method
from floral_peft.tasks import get_task


EPOCHS = (1, 3, 10, 30, 100)


def columns(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels as tensors."""
    rows = dataset.with_format("torch")[:]
    (name,) = [name for name in rows if name not in ("label", "labels")]
    return rows[name].float(), rows["labels" if "labels" in rows else "label"]


def accuracy(model: Any, test: Dataset) -> float:
    """Of the current client's model."""
    inputs, labels = columns(test)
    model.eval()
    with torch.no_grad():
        return float((model(inputs).argmax(dim=-1) == labels).float().mean())


def fine_tuned(model: Any, shots: Dataset, test: Dataset, rate: float) -> float:
    """The best accuracy that training all parameters on the examples passes through, from the uniform mixture."""
    own = copy.deepcopy(model)
    for parameter in own.parameters():
        parameter.requires_grad_(True)
    inputs, labels = columns(shots)
    optimizer = torch.optim.SGD(own.parameters(), lr=rate)
    found = []
    for epoch in range(1, max(EPOCHS) + 1):
        own.train()
        for rows in torch.randperm(len(labels)).split(32):
            loss = torch.nn.functional.cross_entropy(own(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in EPOCHS:
            found.append(accuracy(own, test))
    return max(found)


def measure(task_name: str, data: str | None, seed: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures of one seed, a row per number of shots."""
    task = get_task(task_name).with_data(data if get_task(task_name).data else None)
    settings = {**task.settings, "eval_steps": None, "router_noise": 0.0, "budget": None, "r": 8}
    settings |= (
        {"optimal_routing": True, "num_adaptors": 4, "init_std": 0.0}
        if given.router_update == "optimal"
        else {"router_update": "posterior"}
    )
    if given.rounds:
        settings["rounds"] = given.rounds
    known = {field.name for field in fields(FederatedArguments)}
    adaptors = FloralConfig(**{name: value for name, value in settings.items() if name not in known})
    method, clients = get_method("floral"), task.clients(seed)
    clusters = dict(clients.clusters or {})
    # of each cluster every fifth client
    by_cluster: dict[int, list[Any]] = {}
    for client, cluster in clusters.items():
        by_cluster.setdefault(cluster, []).append(client)
    unseen = [client for members in by_cluster.values() for client in members[::5][: given.clients]]
    seen = {client: clients[client] for client in clients if client not in unseen}
    torch.manual_seed(seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        own = {name: value for name, value in settings.items() if name in known}
        args = FederatedArguments(output_dir=folder, seed=seed, disable_tqdm=True, use_cpu=True, **own)
        dataset = FederatedDataset(seen, clusters={client: clusters[client] for client in seen})
        trainer = FederatedTrainer(task.model_for(method, adaptors, seed), args, dataset, method, loss_fn=task.loss_fn)
        trainer.train()
        model = trainer.model
        model.set_routers(torch.zeros(1, 1, model.num_adaptors))
        uniform = {client: accuracy(model, clients[client]["test"]) for client in unseen}
        one_hot = -1e4 * (1 - torch.eye(model.num_adaptors)).unsqueeze(1)
        model.set_routers(one_hot)
        pure = {}
        for client in unseen:  # the true one; without true routing, whichever is best on the test examples
            choice = [clusters[client]] if given.router_update == "optimal" else range(model.num_adaptors)
            found = []
            for adaptor in choice:
                with model.client(adaptor):
                    found.append(accuracy(model, clients[client]["test"]))
            pure[client] = max(found)
        model.set_routers(torch.zeros(1, 1, model.num_adaptors))
        for shots in given.shots:
            found: dict[str, list[float]] = {name: [] for name in ("labels", "no labels", "fine-tuned", "seconds")}
            for client in unseen:
                train, test = clients[client]["train"], clients[client]["test"]
                for draw in range(given.draws):
                    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))
                    few = train.select(order[:shots].tolist())
                    began = time.perf_counter()
                    trainer.personalize(few, client="labels")
                    found["seconds"].append(time.perf_counter() - began)
                    label = "labels" if "labels" in few.column_names else "label"
                    trainer.personalize(few.remove_columns(label), client="no labels")
                    for name in ("labels", "no labels"):
                        with model.client(name):
                            found[name].append(accuracy(model, test))
                    model.set_routers(torch.zeros(1, 1, model.num_adaptors))
                    if draw == 0:
                        found["fine-tuned"].append(fine_tuned(model, few, test, args.learning_rate))
            told = {name: statistics.mean(values) for name, values in found.items()}
            rows.append(
                {
                    "task": task_name,
                    "trained": given.router_update,
                    "rounds": args.rounds,
                    "seed": seed,
                    "unseen clients": len(unseen),
                    "shots": shots,
                    "uniform": statistics.mean(uniform.values()),
                    "pure": statistics.mean(pure.values()),
                    **told,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["digits", "digits-label-shift"])
    parser.add_argument("--data", help="folder of the tasks' dataset, or a folder of such folders")
    parser.add_argument("--router_update", choices=["optimal", "posterior"], default="optimal")
    parser.add_argument("--rounds", type=int, help="the task's own by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 5, 10, 50])
    parser.add_argument("--clients", type=int, default=5, help="most clients of a cluster that are left out")
    parser.add_argument("--draws", type=int, default=3, help="choices of examples for each client")
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for task in given.task:
        for seed in given.seeds:
            rows += measure(task, given.data, seed, given)
            if given.json:
                with open(given.json, "w", encoding="utf-8") as file:
                    json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
