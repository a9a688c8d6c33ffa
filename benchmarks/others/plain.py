"""The yardstick: FedAvg as a plain PyTorch loop over clients.

    cd benchmarks && python -m others.plain --setting mnist --rounds 10 --out plain.json

Copy the global weights in, train, add the weighted difference; no framework, and no trick either.
"""

from __future__ import annotations

import torch
from others.settings import Run, Setting, initial_net, population
from torch import Tensor, nn


def train(model: nn.Module, images: Tensor, labels: Tensor, setting: Setting) -> None:
    """One epoch of SGD over one client's examples, in a random order."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.learning_rate)
    for rows in torch.randperm(len(labels)).split(setting.batch_size):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()


def fedavg_round(model: nn.Module, setting: Setting, cohort: list[int]) -> None:
    """One round of FedAvg over the clients of `cohort`; `model` holds the global weights, before and after."""
    images, labels = population(setting)
    weights = list(model.parameters())
    start = [weight.detach().clone() for weight in weights]
    total = [torch.zeros_like(weight) for weight in start]
    num_examples = 0
    for client in cohort:
        with torch.no_grad():
            for weight, initial in zip(weights, start, strict=True):
                weight.copy_(initial)
        train(model, images[client], labels[client], setting)
        with torch.no_grad():
            for sum_, weight, initial in zip(total, weights, start, strict=True):
                sum_.add_(weight - initial, alpha=len(labels[client]))
        num_examples += len(labels[client])
    with torch.no_grad():
        for weight, initial, sum_ in zip(weights, start, total, strict=True):
            weight.copy_(initial + sum_ / num_examples)


def main() -> None:
    run = Run.from_arguments(__doc__)
    model = initial_net(run.setting)
    for _ in range(run.rounds + 1):
        fedavg_round(model, run.setting, torch.randperm(run.setting.clients)[: run.setting.cohort].tolist())
        run.tick()
    run.finish("plain", torch.__version__, model)


if __name__ == "__main__":
    main()
