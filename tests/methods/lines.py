"""The smallest problem: lines y = w·x through a single point each, whose steps can be reckoned by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn

import floral_peft.methods  # noqa: F401  (registers the methods)
from floral_peft import FloralConfig
from floral_peft.federated import FederatedArguments, FederatedDataset, FederatedTrainer


#: Client "a" has one example (1, 3), client "b" three examples (1, −1).
POINTS = {"a": (3.0, 1), "b": (-1.0, 3)}


def half_square(outputs: Tensor, labels: Tensor) -> Tensor:
    """½ (w·x − y)², so that its derivative by w at x = 1 is w − y."""
    return 0.5 * (outputs[:, 0] - labels).square().mean()


def line(weight: float, bias: float | None = None) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=bias is not None)
    nn.init.constant_(layer.weight, weight)
    if bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer


def clients() -> FederatedDataset:
    def split(label: float, count: int) -> Dataset:
        return Dataset.from_dict({"x": [[1.0]] * count, "labels": [label] * count})

    held = {k: DatasetDict(train=split(*given), test=split(*given)) for k, given in POINTS.items()}
    return FederatedDataset(held, clusters={"a": 0, "b": 1})


def run(folder: Path, method: Any, model: nn.Module, rounds: int = 1, **settings: Any) -> Any:
    """Train with a rate of ½, one full step a visit unless `local_steps` says otherwise."""
    chosen: dict[str, Any] = {"local_steps": 1, "precondition": False, "router_learning_rate": 1.0, "cohort": "loop"}
    args = FederatedArguments(
        output_dir=str(folder),
        rounds=rounds,
        learning_rate=0.5,
        disable_tqdm=True,
        use_cpu=True,
        **(chosen | settings),
    )
    made = FederatedTrainer(model, args, clients(), method, loss_fn=half_square)
    made.train()
    return made


def adaptors(**config: Any) -> FloralConfig:
    return FloralConfig(target_modules=["0"], r=1, train_base=True, **config)


def weights(model: nn.Module) -> dict[str, float]:
    """Every parameter of one number, by name."""
    return {name: value.item() for name, value in model.named_parameters() if value.numel() == 1}


def own(run: Any, client_id: str) -> dict[str, Tensor]:
    """What a client keeps."""
    kept: dict[str, Tensor] = run._clients.private(client_id)
    return {name: value.flatten().to(torch.float64) for name, value in kept.items()}
