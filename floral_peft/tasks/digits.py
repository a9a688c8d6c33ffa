"""Handwritten digits that come with scikit-learn: 1,797 images of 8 × 8 grey levels, over 20 clients in 4 clusters."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sklearn.datasets import load_digits
from torch import nn

from floral_peft.federated import FederatedDataset
from floral_peft.tasks.changes import Change, rotate, shift_labels
from floral_peft.tasks.task import Task, register_task


CLIENTS = 20
CLUSTERS = 4
TEST_SHARE = 0.3


def digits_clients(seed: int, change: Change = rotate) -> FederatedDataset:
    """Deal the images out to 20 clients, client k in cluster k mod 4, and hold 30 % of each back for testing.

    Args:
        seed: Decides who gets which image, and which of them are for testing.
        change: What makes clusters differ.

    Returns:
        Clients 0 to 19 with about 63 training and 27 test examples each, of `inputs` [64] in [0, 1] and `labels`.
    """
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    clients = {}
    for client, rows in enumerate(order.tensor_split(CLIENTS)):
        inputs, targets = change(images[rows], labels[rows], client % CLUSTERS)
        columns = {"inputs": inputs.flatten(start_dim=1).numpy(), "labels": targets.numpy()}
        tests = round(TEST_SHARE * len(rows))
        examples = Dataset.from_dict(columns).with_format("torch")
        clients[client] = DatasetDict(
            train=examples.select(range(tests, len(rows))), test=examples.select(range(tests))
        )
    return FederatedDataset(clients, clusters={client: client % CLUSTERS for client in clients})


def digits_model() -> nn.Module:
    """A perceptron of 64, 64 and 10 units."""
    return nn.Sequential(OrderedDict(hidden=nn.Linear(64, 64), relu=nn.ReLU(), output=nn.Linear(64, 10)))


SETTINGS: dict[str, Any] = {
    "rounds": 60,
    "per_device_train_batch_size": 16,
    "learning_rate": 0.4,
    "router_learning_rate": 5.0,
    "eval_steps": 3,
    # Twice as many adaptors as clusters, and a random start, give the router's gradient something to choose from.
    "num_adaptors": 2 * CLUSTERS,
    "r": 8,
    "init_std": 0.3,
    "target_modules": ["hidden", "output"],
    "train_base": True,
}

register_task(
    Task(
        name="digits",
        summary="scikit-learn's 1,797 digits, 20 clients; each of 4 clusters sees them turned by another quarter turn",
        clients=digits_clients,
        model=digits_model,
        settings=SETTINGS,
        loss_fn=nn.functional.cross_entropy,
        threads=1,
    )
)
register_task(
    Task(
        name="digits-label-shift",
        summary="the same digits and clients; each of 4 clusters calls the digit y by the name (y + c) mod 10",
        clients=lambda seed: digits_clients(seed, shift_labels),
        model=digits_model,
        settings=SETTINGS,
        loss_fn=nn.functional.cross_entropy,
        threads=1,
    )
)
