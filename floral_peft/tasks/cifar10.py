"""CIFAR-10 over 20 clients in 4 clusters, as in the paper (Almansoori et al., CPAL 2025, section 5)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from floral_peft.tasks.augment import FlipAndCrop
from floral_peft.tasks.images import ImageClients, register_rotated_and_shifted


HUB = "uoft-cs/cifar10"
CLIENTS = 20
CLUSTERS = 4

#: Means and standard deviations of the channels of CIFAR's training images, which lie in [0, 1].
MEANS = (0.4914, 0.4822, 0.4465)
DEVIATIONS = (0.2023, 0.1994, 0.2010)


def channels_last(images: Tensor) -> Tensor:
    """A batch of images with its channels last in memory where the CPU computes: max pooling is ten times as fast."""
    # vmap knows one layout only
    if images.device.type != "cpu" or images.dim() != 4 or torch._C._are_functorch_transforms_active():
        return images
    return images.contiguous(memory_format=torch.channels_last)


torch.fx.wrap("channels_last")  # not to be traced: it asks where the images are


class Normalize(nn.Module):
    """Subtracts each channel's mean from images (examples, channels, ...) and divides by its standard deviation.

    The images come out as of [`channels_last`].
    """

    means: Tensor
    deviations: Tensor

    def __init__(self, means: tuple[float, ...] = MEANS, deviations: tuple[float, ...] = DEVIATIONS) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(means).view(-1, 1, 1), persistent=False)
        self.register_buffer("deviations", torch.tensor(deviations).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The images, normalised."""
        return channels_last((images - self.means) / self.deviations)


def cifar10_model() -> nn.Module:
    """Two convolutions, each with a pool after it, and two linear layers: 87,178 parameters."""
    return nn.Sequential(
        OrderedDict(
            normalize=Normalize(),
            conv1=nn.Conv2d(3, 32, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(3),
            flatten=nn.Flatten(),
            hidden=nn.Linear(64 * 4 * 4, 64),
            relu3=nn.ReLU(),
            output=nn.Linear(64, 10),
        )
    )


SETTINGS: dict[str, Any] = {
    "rounds": 500,
    "per_device_train_batch_size": 64,
    "learning_rate": 0.03,
    "router_learning_rate": 0.1,
    "eval_steps": 25,
    "num_adaptors": CLUSTERS,
    "budget": 0.01,
    "router_noise": 1.0,
    "target_modules": ["conv1", "conv2", "hidden", "output"],
    "train_base": True,
}

register_rotated_and_shifted(
    "cifar10",
    "CIFAR-10",
    ImageClients("cifar10", CLIENTS, CLUSTERS, augment=FlipAndCrop),
    examples=2500,
    settings=SETTINGS,
    model=cifar10_model,
    data=HUB,
)
