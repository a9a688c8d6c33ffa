"""Statistics that the tuner calls private stay with their client, as routers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch import nn

from floral_peft import FederatedArguments, FederatedDataset, FederatedTrainer, FloralConfig


def test_reparametrised_batch_norm_keeps_a_clients_statistics_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clients = {}
    for name, mean in (("low", -5.0), ("high", 5.0)):
        rows: dict[str, Any] = {
            "x": rng.normal(mean, 1, (16, 3)).astype(np.float32), "labels": rng.integers(0, 2, 16),
        }  # fmt: skip
        split = Dataset.from_dict(rows).with_format("torch")
        clients[name] = DatasetDict(train=split, test=split)
    config = FloralConfig(num_adaptors=2, r=2, target_modules=["1"], adapt_norms="reparametrized", train_base=True)
    model: Any = peft.get_peft_model(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), config)
    args = FederatedArguments(
        output_dir=str(tmp_path), rounds=3, per_device_train_batch_size=8, learning_rate=0.01, save_steps=3,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = FederatedTrainer(model, args, FederatedDataset(clients))
    trainer.train()
    statistics = {
        name: trainer._clients.private(name)["base_model.model.0.base_layer.running_mean"] for name in clients
    }
    assert bool((statistics["low"] < -1).all()) and bool((statistics["high"] > 1).all())
    (saved,) = tmp_path.glob("checkpoint-3/server/tensors.safetensors")
    assert not any("running" in name or "floral_mean" in name for name in load_file(saved))
    assert torch.equal(model.base_model.model[0].base_layer.running_mean, torch.zeros(3))
