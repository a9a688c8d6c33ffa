"""Regression on data that low-rank mixtures of models made, as in the paper (CPAL 2025, section 5 and figure 2)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict
from torch import Tensor, nn

from floral_peft.federated import FederatedDataset
from floral_peft.federated.seeding import derive_seed
from floral_peft.tasks.tables import as_dataset, cut
from floral_peft.tasks.task import Task, register_task


INPUTS = 10


@dataclass(frozen=True)
class SyntheticClients:
    """Seed → clients 0 to K − 1, client k in cluster k mod C, whose data a model of their cluster made.

    With x ~ N(0, I), cluster c has y = x (W + α U_c V_c) + b, or y = ReLU(x (W + α U_c V_c) + b) Φ. W, U_c, b and Φ
    are normal with variance 1/d, d the number of inputs; V_c is with variance 1/rank. There is no noise, so a loss of
    0 can be reached.

    Attributes:
        clients: K.
        clusters: C.
        outputs: How many numbers y has.
        examples: Of each client; four fifths, rounded up, are for training.
        hidden: Whether a hidden layer of 10 units, with ReLU and Φ, stands between x and y.
        normalized: Whether the hidden units are brought to mean 0 and variance 1 over each client's examples.
        rank: The rank of U_c V_c.
        alpha: α.
    """

    clients: int
    clusters: int
    outputs: int
    examples: int
    hidden: bool = False
    normalized: bool = False
    rank: int = 1
    alpha: float = 2.0

    def __call__(self, seed: int) -> FederatedDataset:
        """Clients with `inputs` [10] and `labels` [outputs]."""
        draws = torch.Generator().manual_seed(derive_seed(seed, "synthetic"))

        def normal(*shape: int, variance: float = 1 / INPUTS) -> Tensor:
            return torch.randn(*shape, generator=draws) * math.sqrt(variance)

        width = INPUTS if self.hidden else self.outputs
        base, bias = normal(INPUTS, width), normal(width)
        left = normal(self.clusters, INPUTS, self.rank)
        right = normal(self.clusters, self.rank, width, variance=1 / self.rank)
        last = normal(INPUTS, self.outputs) if self.hidden else None
        train = math.ceil(0.8 * self.examples)
        found = {}
        for client in range(self.clients):
            cluster = client % self.clusters
            inputs = normal(self.examples, INPUTS, variance=1.0)
            values = inputs @ (base + self.alpha * left[cluster] @ right[cluster]) + bias
            if last is not None:
                units = values.relu()
                if self.normalized:
                    units = (units - units.mean(0)) / units.std(0)
                values = units @ last
            dataset = as_dataset({"inputs": inputs.numpy(), "labels": values.numpy()})
            parts = cut(dataset, [train, self.examples - train])
            found[client] = DatasetDict(train=parts[0], test=parts[1])
        return FederatedDataset(found, clusters={client: client % self.clusters for client in found})


def linear_model() -> nn.Module:
    """10 inputs, 3 outputs: 33 parameters."""
    return nn.Sequential(OrderedDict(output=nn.Linear(INPUTS, 3)))


def mlp_model() -> nn.Module:
    """10 inputs, 20 hidden units, twice those that made the data, and 1 output: 241 parameters."""
    return nn.Sequential(OrderedDict(hidden=nn.Linear(INPUTS, 20), relu=nn.ReLU(), output=nn.Linear(20, 1)))


def mlp_batch_norm_model() -> nn.Module:
    """The same with a batch norm behind the hidden units: 281 parameters."""
    return nn.Sequential(
        OrderedDict(hidden=nn.Linear(INPUTS, 20), relu=nn.ReLU(), norm=nn.BatchNorm1d(20), output=nn.Linear(20, 1))
    )


def _settings(clusters: int, batch_size: int, rate: float, targets: list[str]) -> dict[str, Any]:
    return {
        "rounds": 2000,
        "per_device_train_batch_size": batch_size,
        "learning_rate": rate,
        "router_learning_rate": 0.1,
        "eval_steps": 20,
        "num_adaptors": clusters,
        "budget": 0.01,
        "router_noise": 1.0,
        "target_modules": targets,
        "train_base": True,
    }


def _register(
    name: str, summary: str, clients: SyntheticClients, model: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    loss = nn.functional.mse_loss
    register_task(Task(name, summary, clients, model, settings=settings, loss_fn=loss, threads=1))


# A quarter as many examples per client as the model has parameters, and half as many.
_register(
    "synthetic-linear",
    "regression, 10 clients of 8 examples; the linear models of 2 clusters differ by a matrix of rank 1",
    SyntheticClients(clients=10, clusters=2, outputs=3, examples=8),
    linear_model,
    _settings(2, 4, 0.1, ["output"]),
)
_register(
    "synthetic-mlp",
    "regression, 20 clients of 120 examples; the perceptrons of 4 clusters differ by a matrix of rank 1",
    SyntheticClients(clients=20, clusters=4, outputs=1, examples=120, hidden=True),
    mlp_model,
    _settings(4, 8, 0.03, ["hidden", "output"]),
)
_register(
    "synthetic-mlp-batch-norm",
    "the same with normalised hidden units, and a batch norm in the model",
    SyntheticClients(clients=20, clusters=4, outputs=1, examples=140, hidden=True, normalized=True),
    mlp_batch_norm_model,
    _settings(4, 5, 0.03, ["hidden", "output"]),
)
