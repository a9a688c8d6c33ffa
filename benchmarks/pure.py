"""What the losses of all C pure models cost, in forward passes of the mixture (its weights merged anew each time).

    python benchmarks/pure.py [--json FILE]

Compared, interleaved, as medians of ratios of CPU time: a router that is one-hot at each adaptor in turn (naive), the
same from slices of the factors (loop), and all adaptors as one batched computation (batched), which `PureModels`
chooses where no convolution is adapted on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from floral_peft import FloralConfig
from floral_peft.tuner import PureModels


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(3),
        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def measure(base: nn.Module, shape: tuple[int, ...], adaptors: int, rank: int, repeats: int) -> dict[str, float]:
    """Ratios to one forward pass of the mixture."""
    targets = [name for name, layer in base.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    config = FloralConfig(target_modules=targets, num_adaptors=adaptors, r=rank, init_weights=False, train_base=True)
    model: Any = peft.get_peft_model(base, config)
    model.eval()
    x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])
    one_hot = -1e4 * (1 - torch.eye(adaptors)).view(adaptors, 1, 1, adaptors)

    def loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch), y)

    def naive() -> None:
        for router in one_hot:
            model.set_routers(router)
            with torch.no_grad():
                loss(x)

    def mixture() -> None:
        with torch.no_grad():
            loss(x)

    batched, loop = PureModels(model), PureModels(model)
    batched._together, loop._together = True, False
    ways: dict[str, Callable[[], Any]] = {
        "forward": mixture,
        "naive": naive,
        "loop": lambda: loop.losses(loss, [x]),
        "batched": lambda: batched.losses(loss, [x]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 2):
        for name, way in ways.items():
            began = time.process_time()
            way()
            times[name].append(time.process_time() - began)
    if not batched._together:
        raise RuntimeError("vmap could not run this model")
    ratios = {
        name: [a / b for a, b in zip(found[2:], times["forward"][2:], strict=True)] for name, found in times.items()
    }
    return {name: round(statistics.median(found), 2) for name, found in ratios.items() if name != "forward"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, base, shapes in (
        ("784-200-10", perceptron, [(10, 784), (200, 784)]),
        ("CIFAR-10 net", convolutional, [(32, 3, 32, 32)]),
    ):
        for shape in shapes:
            for adaptors, rank in ((4, 1), (16, 16)) if name == "784-200-10" else ((4, 4), (8, 4)):
                torch.manual_seed(0)
                found = measure(base(), shape, adaptors, rank, given.repeats)
                rows.append({"model": name, "examples": shape[0], "C": adaptors, "r": rank, **found})
                print(json.dumps(rows[-1]), flush=True)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
