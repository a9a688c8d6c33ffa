"""Batch norm over clusters whose activations differ: an adaptor's statistics are those of its users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch import Tensor, nn

from floral_peft import FederatedDataset
from floral_peft.federated.groups import Clustered

from .clients import floral_net, trainer


def dark_and_bright() -> FederatedDataset:
    """Eight clients of 32 points around −5 or 5; whether a point is above its client's mean is its label."""
    clients = {}
    for client in range(8):
        rng = np.random.default_rng(client)
        points = rng.normal(0, 1, (32, 3)).astype(np.float32)
        rows: dict[str, Any] = {"points": points + (-5.0, 5.0)[client % 2], "labels": (points[:, 0] > 0).astype(int)}
        split = Dataset.from_dict(rows).with_format("torch")
        clients[client] = DatasetDict(train=split, test=split)
    return FederatedDataset(clients, clusters={client: client % 2 for client in clients})


def model() -> Any:
    torch.manual_seed(0)
    return floral_net(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), target_modules=["1"])


@pytest.mark.parametrize("cohort", ["loop", "vectorized"])
def test_each_cluster_is_evaluated_by_its_own(tmp_path: Path, cohort: str) -> None:
    made = trainer(
        tmp_path, model=model(), dataset=dark_and_bright(), rounds=12, optimal_routing=True, cohort=cohort,
        learning_rate=0.3, save_steps=12,
    )  # fmt: skip
    made.train()
    (saved,) = tmp_path.glob("checkpoint-12/server/tensors.safetensors")
    mean = load_file(saved)["base_model.model.0.floral_mean.default"]
    assert bool((mean[0] + 5).abs().max() < 0.5) and bool((mean[1] - 5).abs().max() < 0.5)
    norm = made.model.base_model.model[0]
    torch.testing.assert_close(norm.floral_mean["default"], mean)
    assert bool(norm.base_layer.running_mean.abs().max() < 0.5)  # of all clients: nobody's
    assert made.evaluate()["eval_accuracy"] > 0.9
    points: Tensor = made.dataset[3]["test"][:]["points"]
    with made.model.eval().client(3), torch.no_grad():  # outside the trainer, too
        found = made.model(points).argmax(dim=1)
    assert float((found == made.dataset[3]["test"][:]["labels"]).float().mean()) > 0.9


def test_the_server_gets_them_adaptor_by_adaptor_and_no_optimiser_moves_them(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=model(), dataset=dark_and_bright(), rounds=1, server_optimizer="adam")
    groups = made._groups
    for name in ("base_model.model.0.floral_mean.default", "base_model.model.0.floral_var.default"):
        assert groups.clustered[name] == Clustered(0, 0)
        assert name in groups.statistics and name not in groups.optimized and name not in groups.private


def test_a_local_adaptor_keeps_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = floral_net(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), target_modules=["1"], num_adaptors=1)
    made = trainer(tmp_path, "local_adaptor", net, dark_and_bright(), rounds=6)
    made.train()
    means = [made._clients.private(client)["base_model.model.0.floral_mean.default"] for client in (0, 1)]
    assert bool((means[0] < -3).all()) and bool((means[1] > 3).all())


def test_the_posterior_finds_clusters_that_batch_norm_hides(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, model=model(), dataset=dark_and_bright(), rounds=20, router_update="posterior", learning_rate=0.1
    )
    made.train()
    assert made.evaluate()["eval_accuracy"] > 0.9
