"""The two settings on which frameworks are compared: data, nets, and how a run is timed and written down.

Needs torch alone: it is used in each framework's own environment, and by the project's benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from models import mnist_net
from torch import Tensor, nn


def pfl_cifar_net() -> nn.Module:
    """The net of pfl-research's CIFAR-10 benchmark, 1,626,442 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A population of equal clients, and what each does in a round: one epoch of SGD."""

    name: str
    net: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    clients: int
    examples: int
    cohort: int
    batch_size: int
    learning_rate: float
    pattern: float
    """How far a class's pattern stands out of the noise of standard deviation one."""


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("mnist", mnist_net, (1, 28, 28), 10, 1500, 10, 32, 0.1, pattern=0.1),
        Setting("cifar", pfl_cifar_net, (3, 32, 32), 1000, 50, 50, 10, 0.1, pattern=0.3),
    )
}


def initial_net(setting: Setting) -> nn.Module:
    """The net with the weights that every framework starts from; seeds torch's generator."""
    torch.manual_seed(0)
    return setting.net()


@cache
def population(setting: Setting) -> tuple[Tensor, Tensor]:
    """All clients' images [clients, examples, *shape] and labels [clients, examples].

    Noise over ten faint patterns of 4 × 4 tiles: learnt a bit in a few rounds, and not to a loss near zero.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.clients, setting.examples, *setting.shape, generator=generator)
    labels = torch.randint(10, (setting.clients, setting.examples), generator=generator)
    channels, height, width = setting.shape
    tiles = setting.pattern * torch.randn(10, channels, 4, 4, generator=generator)
    patterns = tiles.repeat_interleave(height // 4, 2).repeat_interleave(width // 4, 3)
    for own_images, own_labels in zip(images, labels, strict=True):
        own_images += patterns[own_labels]
    return images, labels


@torch.no_grad()
def training_loss(model: nn.Module, setting: Setting) -> float:
    """The mean cross entropy over 2,000 training examples spread over the clients, without dropout."""
    images, labels = population(setting)
    stride = labels.numel() // 2000
    model.eval()
    return nn.functional.cross_entropy(model(images.flatten(0, 1)[::stride]), labels.flatten()[::stride]).item()


@dataclass
class Run:
    """One timed run: a warm-up round, which counts as start-up, and `rounds` rounds that are measured."""

    setting: Setting
    rounds: int
    out: Path
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @classmethod
    def from_arguments(cls, description: str | None) -> Run:
        """Read the command line, and keep torch to one thread."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--setting", choices=SETTINGS, required=True)
        parser.add_argument("--rounds", type=int, default=10, help="how many are measured, after one that warms up")
        parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
        options = parser.parse_args()
        torch.set_num_threads(1)
        return cls(SETTINGS[options.setting], options.rounds, options.out)

    def tick(self) -> None:
        """Mark the end of a round."""
        self.wall.append(seconds_of_this_process())
        self.processor.append(time.process_time())

    def finish(self, framework: str, version: str, model: nn.Module, one_process: bool = True) -> None:
        """Write the figures; `model` holds the last round's weights."""
        if len(self.wall) != self.rounds + 1:
            raise RuntimeError(f"{framework} ended {len(self.wall)} rounds, expected {self.rounds + 1}")
        seconds = differences(self.wall)
        figures = {
            "setting": self.setting.name, "framework": framework, "version": version, "torch": torch.__version__,
            "clients": self.setting.clients, "cohort": self.setting.cohort, "rounds": self.rounds,
            "seconds_per_round": seconds,
            "processor_seconds_per_round": differences(self.processor) if one_process else None,
            "startup_seconds": self.wall[0] - statistics.median(seconds),
            "loss_before": training_loss(initial_net(self.setting), self.setting),
            "loss_after": training_loss(model, self.setting),
        }  # fmt: skip
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(figures, indent=1) + "\n")
        print(
            f"{framework} {version}, {self.setting.name}: {statistics.median(seconds):.4f} s a round (median of "
            f"{self.rounds}), start-up {figures['startup_seconds']:.1f} s, "
            f"loss {figures['loss_before']:.3f} -> {figures['loss_after']:.3f}"
        )


def differences(times: list[float]) -> list[float]:
    """What lies between each time and the next."""
    return [after - before for before, after in pairwise(times)]


def seconds_of_this_process() -> float:
    """The wall-clock seconds since this process was started, its imports included (Linux; to a hundredth)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
