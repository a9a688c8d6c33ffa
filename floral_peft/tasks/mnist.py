"""MNIST over 300 clients in 4 clusters, as in the paper (Almansoori et al., CPAL 2025, section 5)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from floral_peft.tasks.changes import Change, rotate, shift_labels
from floral_peft.tasks.images import ImageClients, register_whole_and_reduced


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


def _register(name: str, change: Change, how: str) -> None:
    register_whole_and_reduced(
        f"mnist-{name}",
        f"MNIST, 300 clients of {{}} training images; each of 4 clusters {how}",
        ImageClients("mnist", CLIENTS, CLUSTERS, change, flat=True),
        examples=200,
        settings=SETTINGS,
        model=mnist_model,
        threads=1,
        data=HUB,
    )


_register("rotate", rotate, "sees them turned by another quarter turn")
_register("label-shift", shift_labels, "calls the digit y by the name (y + c) mod 10")
