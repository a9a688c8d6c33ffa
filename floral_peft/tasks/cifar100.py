"""CIFAR-100 over 100 clients in 10 clusters of 10 classes each, as in the paper (CPAL 2025, section 5)."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

from torch import nn

from floral_peft.tasks.augment import FlipAndCrop
from floral_peft.tasks.cifar10 import Normalize
from floral_peft.tasks.images import ImageClients, register_whole_and_reduced


HUB = "uoft-cs/cifar100"
CLIENTS = 100
CLUSTERS = 10
CHANNELS = (16, 32, 64, 128, 512)


def vgg8() -> nn.Module:
    """VGG-8: five convolutions, each with a pool after it, and three linear layers: 1,264,388 parameters."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize())
    channels = 3
    for index, width in enumerate(CHANNELS, start=1):
        conv = nn.Conv2d(channels, width, 3, padding=1)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * width)))
        nn.init.zeros_(conv.get_parameter("bias"))
        layers |= {f"conv{index}": conv, f"relu{index}": nn.ReLU(), f"pool{index}": nn.MaxPool2d(2)}
        channels = width
    layers |= {
        "flatten": nn.Flatten(),
        "dropout1": nn.Dropout(),
        "hidden1": nn.Linear(512, 512),
        "relu6": nn.ReLU(),
        "dropout2": nn.Dropout(),
        "hidden2": nn.Linear(512, 512),
        "relu7": nn.ReLU(),
        "output": nn.Linear(512, 100),
    }
    return nn.Sequential(layers)


SETTINGS: dict[str, Any] = {
    "rounds": 500,
    "clients_per_round": 0.5,
    "per_device_train_batch_size": 64,
    "learning_rate": 0.001,
    "router_learning_rate": 0.1,
    "server_optimizer": "adam",
    "server_learning_rate": 0.001,
    "eval_steps": 25,
    "num_adaptors": CLUSTERS,
    "budget": 0.01,
    "router_noise": 1.0,
    "target_modules": [*(f"conv{index}" for index in range(1, 6)), "hidden1", "hidden2", "output"],
    "train_base": True,
}

register_whole_and_reduced(
    "cifar100",
    "CIFAR-100, 100 clients of {} training images; each of 10 clusters has 10 of the labels",
    ImageClients("cifar100", CLIENTS, CLUSTERS, by_label=True, augment=FlipAndCrop),
    examples=500,
    settings=SETTINGS,
    model=vgg8,
    data=HUB,
)
