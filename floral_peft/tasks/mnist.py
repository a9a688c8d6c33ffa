"""MNIST over 300 clients in 4 clusters, as in the paper (Almansoori et al., CPAL 2025, section 5)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from floral_peft.tasks.images import ImageClients, register_rotated_and_shifted


HUB = "ylecun/mnist"
CLIENTS = 300
CLUSTERS = 4


def mnist_model() -> nn.Module:
    """A perceptron of 784, 200 and 10 units: 159,010 parameters."""
    return nn.Sequential(OrderedDict(hidden=nn.Linear(784, 200), relu=nn.ReLU(), output=nn.Linear(200, 10)))


SETTINGS: dict[str, Any] = {
    "rounds": 500,
    "clients_per_round": 0.1,
    "per_device_train_batch_size": 32,
    "learning_rate": 0.1,
    "router_learning_rate": 0.1,
    "eval_steps": 25,
    "num_adaptors": CLUSTERS,
    "budget": 0.01,
    "router_noise": 1.0,
    "target_modules": ["hidden", "output"],
    "train_base": True,
}

register_rotated_and_shifted(
    "mnist",
    "MNIST",
    ImageClients("mnist", CLIENTS, CLUSTERS, flat=True),
    examples=200,
    settings=SETTINGS,
    model=mnist_model,
    threads=1,
    data=HUB,
)
