from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import default_data_collator

from floral_peft import FederatedArguments, FederatedDataset, FederatedTrainer
from floral_peft.federated.batches import Examples
from floral_peft.federated.transforms import BatchTransform


@dataclass(frozen=True)
class Shake(BatchTransform):
    """Adds noise to the points."""

    scale: float = 1.0

    def tensors(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "points": batch["points"] + self.scale * torch.randn(batch["points"].shape)}


def shaken(scale: float, count: int = 12) -> Dataset:
    points = torch.arange(2.0 * count).view(count, 2) / count
    columns = {"points": points.numpy(), "label": (torch.arange(count) % 2).numpy()}
    return Dataset.from_dict(columns).with_transform(Shake(scale))


def test_batches_are_transformed_from_memory_as_datasets_would_do_it() -> None:
    dataset = shaken(1.0)
    examples = Examples(dataset, default_data_collator, torch.device("cpu"))
    assert examples._arrays is not None
    torch.manual_seed(0)
    batch = examples.batch(torch.tensor([3, 1]))
    torch.manual_seed(0)
    expected = dataset.__getitems__([3, 1])
    assert batch["labels"].tolist() == [row["label"] for row in expected] == [1, 1]
    torch.testing.assert_close(batch["points"], torch.stack([row["points"] for row in expected]))


def test_every_batch_is_transformed_anew_and_what_is_in_memory_stays() -> None:
    examples = Examples(shaken(1.0), default_data_collator, torch.device("cpu"))
    first, second = (batch["points"] for _, batch in examples.batches(torch.tensor([[0, 1], [0, 1]])))
    assert not torch.equal(first, second)
    still = Examples(shaken(0.0), default_data_collator, torch.device("cpu"))
    assert torch.equal(still.batch(torch.tensor([0]))["points"], still.batch(torch.tensor([0]))["points"])


def test_a_split_too_large_for_memory_is_transformed_row_by_row() -> None:
    examples = Examples(shaken(0.0), default_data_collator, torch.device("cpu"), resident=1)
    assert examples._arrays is None
    batch = examples.batch(torch.tensor([6]))
    assert batch["points"].tolist() == [[1.0, pytest.approx(13 / 12)]]
    assert batch["labels"].tolist() == [0]


def test_clients_side_by_side_see_what_each_sees_alone(tmp_path: Path) -> None:
    def trained(cohort: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2))
        args = FederatedArguments(
            str(tmp_path / cohort), rounds=2, cohort=cohort, per_device_train_batch_size=4, disable_tqdm=True
        )
        clients = FederatedDataset({client: shaken(1.0, 5 + 3 * client) for client in range(3)})
        FederatedTrainer(model, args, clients, "fedavg", loss_fn=nn.functional.cross_entropy).train()
        return nn.utils.parameters_to_vector(model.parameters())

    torch.testing.assert_close(trained("vectorized"), trained("loop"))
