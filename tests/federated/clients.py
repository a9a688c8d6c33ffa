"""Small clients and models that several tests use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import TrainerCallback

import floral_peft.methods  # noqa: F401  (registers the methods)
from floral_peft import FloralConfig
from floral_peft.federated import FederatedArguments, FederatedDataset, FederatedTrainer, get_method


def examples(num_examples: int, seed: int = 0, cluster: int = 0, num_features: int = 4, classes: int = 3) -> Dataset:
    """Points whose class is given by a linear map; a cluster shifts the classes."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_examples, num_features, generator=generator)
    truth = torch.randn(num_features, classes, generator=torch.Generator().manual_seed(99))
    labels = ((points @ truth).argmax(dim=1) + cluster) % classes
    return Dataset.from_dict({"points": points.tolist(), "labels": labels.tolist()})


def population(num_clients: int = 4, num_examples: int = 12, num_clusters: int = 2) -> FederatedDataset:
    """Clients "0", "1", ... of known clusters, with training and test examples."""
    clients = {
        f"client {k}": DatasetDict(
            train=examples(num_examples + k, seed=k, cluster=k % num_clusters),
            test=examples(6, seed=1000 + k, cluster=k % num_clusters),
        )
        for k in range(num_clients)
    }
    return FederatedDataset(clients, clusters={name: k % num_clusters for k, name in enumerate(clients)})


def net(*, norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(4, 8), nn.BatchNorm1d(8)] if norm else [nn.Linear(4, 8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3))


def floral_net(base: nn.Module | None = None, **config: Any) -> Any:
    settings: dict[str, Any] = {"num_adaptors": 2, "r": 2, "target_modules": "all-linear", "train_base": True} | config
    model = base or net()
    if settings["target_modules"] == "all-linear":
        settings["target_modules"] = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    torch.manual_seed(1)
    return peft.get_peft_model(model, FloralConfig(**settings))


def model_for(method: str, base: nn.Module | None = None) -> Any:
    """A small model that the method can train."""
    adaptors = FloralConfig(num_adaptors=2, r=2, target_modules=["0", "2"], train_base=True)
    torch.manual_seed(1)
    return get_method(method).prepare(base or net(), adaptors)


def arguments(folder: Path, **settings: Any) -> FederatedArguments:
    defaults: dict[str, Any] = {
        "rounds": 2,
        "cohort": "loop",
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        "router_update": "gradient",  # where local steps train every parameter, a test can say what becomes of each
    }
    return FederatedArguments(output_dir=str(folder), **(defaults | settings))


def trainer(folder: Path, method: str = "floral", model: Any = None, dataset: Any = None, **settings: Any) -> Any:
    keywords = ("data_collator", "compute_metrics", "callbacks", "loss_fn")
    given = {name: settings.pop(name) for name in keywords if name in settings}
    model = model if model is not None else model_for(method)
    return FederatedTrainer(model, arguments(folder, **settings), dataset or population(), method=method, **given)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class StopAfter(TrainerCallback):
    """Ends a training after a round, so that it can be gone on with."""

    def __init__(self, round: int) -> None:
        self._round = round

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop |= state.global_step == self._round
        return control
