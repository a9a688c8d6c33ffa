"""Splits are read once for as long as they are there, and a reading is never taken for that of another split."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from floral_peft.federated import FederatedDataset, batches, sources
from floral_peft.federated.batches import Examples
from floral_peft.federated.readings import Readings
from floral_peft.federated.views import Viewed

from .clients import population, trainer


CPU = torch.device("cpu")


def table(rows: int = 4, start: int = 0) -> Dataset:
    return Dataset.from_dict({"x": np.arange(start, start + rows, dtype=np.float32), "labels": [0] * rows})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the splits that are read."""
    found: list[int] = []
    read = batches._as_arrays

    def noting(dataset: Dataset) -> Any:
        found.append(len(dataset))
        return read(dataset)

    monkeypatch.setattr(batches, "_as_arrays", noting)
    return found


def values(dataset: Dataset, readings: Readings, **more: Any) -> list[float]:
    examples = Examples(dataset, default_data_collator, CPU, readings=readings, **more)
    found: list[float] = examples.batch(torch.arange(len(examples)))["x"].tolist()
    return found


def test_a_split_is_read_once(reads: list[int]) -> None:
    readings, first, second = Readings(), table(), table(3, start=7)
    for _ in range(3):
        assert values(first, readings) == [0.0, 1.0, 2.0, 3.0]
        assert values(second, readings) == [7.0, 8.0, 9.0]
    assert reads == [4, 3]


def test_views_of_one_table_are_different_splits(reads: list[int]) -> None:
    readings = Readings()
    data = FederatedDataset.from_partition(table(12), 3, seed=1)
    expected = {client_id: data[client_id]["train"]["x"] for client_id in data}
    for _ in range(2):
        for client_id in data:
            assert values(data[client_id]["train"], readings) == list(expected[client_id])
    assert reads == [4, 4, 4]


def test_other_columns_are_another_reading() -> None:
    readings, data = Readings(), table()
    assert values(data, readings) == [0.0, 1.0, 2.0, 3.0]
    data.set_format("torch", columns=["labels"])
    batch = Examples(data, default_data_collator, CPU, readings=readings).batch(torch.tensor([0]))
    assert batch.keys() == {"labels"}


def test_a_split_that_is_too_large_now_is_not_held() -> None:
    readings, data = Readings(), table()
    assert values(data, readings)
    assert not Examples(data, default_data_collator, CPU, resident=1, readings=readings).resident


def test_the_latest_ones_are_kept(reads: list[int]) -> None:
    each = 4 * (4 + 8)
    readings, tables = Readings(limit=2 * each), [table(start=k) for k in range(3)]
    for data in (tables[0], tables[1], tables[0], tables[2]):  # the second goes
        values(data, readings)
    assert reads == [4, 4, 4]
    for data in (tables[2], tables[0]):
        values(data, readings)
    assert reads == [4, 4, 4]
    values(tables[1], readings)
    assert reads == [4, 4, 4, 4] and readings._nbytes == 2 * each


def test_what_is_gone_is_forgotten() -> None:
    readings, data = Readings(), table()
    values(data, readings)
    del data
    gc.collect()
    assert not readings._held and readings._nbytes == 0


def test_a_run_reads_each_client_once(tmp_path: Path, reads: list[int]) -> None:
    for cohort in ("loop", "vectorized"):
        data = population(num_clients=3)
        reads.clear()
        trainer(tmp_path / cohort, "floral", dataset=data, rounds=4, eval_steps=None, cohort=cohort).train()
        assert sorted(reads) == [12, 12, 13, 13, 14, 14]  # the first time before the run, to see whether it can go


def test_views_that_come_and_go_are_never_taken_for_one_another() -> None:
    """Their table stays; what is made anew at an address that was somebody else's is another's row numbers."""
    readings, viewed = Readings(), Viewed(table(12))
    for first in range(200):
        rows = np.array([first % 10, (first + 2) % 12], dtype=np.int64)
        assert values(viewed.view(rows), readings) == rows.astype(float).tolist()


def test_narrow_numbers_are_read_once_too(reads: list[int]) -> None:
    """A split's size is what the dataset holds, whatever its batches' types are."""
    data = Dataset.from_dict({"x": np.zeros(10, dtype=np.uint8)})
    readings = Readings()
    for _ in range(3):
        assert len(values(data, readings, resident=10)) == 10
    assert reads == [10]


def test_a_split_too_large_to_be_kept_puts_out_no_others(reads: list[int]) -> None:
    readings, small = Readings(limit=100), table()
    for data in (small, table(rows=1000), small):
        values(data, readings)
    assert reads == [4, 1000]


def test_a_format_that_the_dataset_gets_later_is_that_of_all_clients() -> None:
    whole = table(12)
    data = FederatedDataset.from_partition(whole, 3, seed=1)
    assert data[0]["train"].format["columns"] == ["x", "labels"]
    whole.set_transform(lambda batch: {"x": [0.1 * value for value in batch["x"]]}, columns=["x"])
    assert all(max(data[client_id]["train"][:]["x"]) < 2 for client_id in data)


def test_views_are_kept_for_some_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PLACES", 2)
    data = FederatedDataset.from_partition(table(12), 3, seed=1)
    first = data[0]["train"]
    assert data[0]["train"]._data is first._data and data[0]["train"]._indices is first._indices
    first.set_format("torch", columns=["labels"])
    assert data[0]["train"].format["columns"] == ["x", "labels"]  # that format is of that view only
    held = [data[k]["train"] for k in (1, 2, 0)]
    assert held[2]._indices is not first._indices and list(held[2]["x"]) == list(first.with_format(None)["x"])
