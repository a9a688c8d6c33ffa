"""Large populations: what a client costs does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from floral_peft.federated import FederatedDataset
from floral_peft.federated.partition import Assignment, by_labels, dirichlet, iid
from floral_peft.federated.views import Viewed

from .clients import floral_net, trainer


def rows(count: int = 40) -> Dataset:
    return Dataset.from_dict({"row": list(range(count)), "who": [f"client {row % 7}" for row in range(count)]})


def on_disk(folder: Path) -> Dataset:
    """Several files, each memory-mapped."""
    rows().save_to_disk(folder, num_shards=3)
    return load_from_disk(folder)


SOURCES: dict[str, Callable[[Path], Dataset]] = {
    "memory": lambda folder: rows(),
    "disk": on_disk,
    "chunks": lambda folder: concatenate_datasets([rows(9), rows(31)]),
    "selection": lambda folder: rows(99).shuffle(seed=0).select(range(40)),
    "torch": lambda folder: rows().with_format("torch", columns=["row"]),
    "transform": lambda folder: rows().with_transform(lambda batch: {"twice": [2 * row for row in batch["row"]]}),
}
CHOICES = {"scattered": [3, 1, 39, 8], "run": [12, 13, 14], "one": [7], "none": []}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_view_is_what_select_gives(tmp_path: Path, source: str, choice: str) -> None:
    dataset = SOURCES[source](tmp_path)
    chosen = CHOICES[choice]
    view, selected = Viewed(dataset).view(np.array(chosen, dtype=np.int64)), dataset.select(chosen)
    assert view.features == selected.features
    assert view.format["type"] == selected.format["type"]
    assert len(view) == len(selected)
    assert [str(view[k]) for k in range(len(view))] == [str(selected[k]) for k in range(len(selected))]
    if chosen:
        again, other = view.with_format(None).shuffle(seed=1), selected.with_format(None).shuffle(seed=1)
        assert again["row"][:] == other["row"][:]


def test_views_of_different_rows_are_cached_apart() -> None:
    viewed = Viewed(rows())
    names = [viewed.view(np.array(chosen))._fingerprint for chosen in ([1, 2], [2, 1], [1, 3], [1, 2])]
    assert names[0] == names[3]
    assert len(set(names)) == 3


@pytest.mark.parametrize("source", SOURCES)
def test_clients_of_a_column_are_grouped_the_same_however_the_rows_are_stored(tmp_path: Path, source: str) -> None:
    dataset = SOURCES[source](tmp_path)
    plain = dataset.with_format(None)
    clients = FederatedDataset.from_column(dataset, "who")
    who = plain["who"][:]
    assert list(clients) == list(dict.fromkeys(who))
    for client_id in clients:
        found = clients[client_id]["train"].with_format(None)["row"][:]
        assert found == [row for row, owner in zip(plain["row"][:], who, strict=True) if owner == client_id]


def test_a_missing_name_is_told_by_its_row() -> None:
    dataset = Dataset.from_dict({"row": [0, 1, 2, 3], "who": ["a", None, "b", None]})
    with pytest.raises(TypeError, match="column='who', row 1: None must be a string or an int"):
        FederatedDataset.from_column(dataset, "who")
    with pytest.raises(TypeError, match="column='who', row 2: None"):
        FederatedDataset.from_column(dataset.select([0, 2, 3]), "who")
    assert list(FederatedDataset.from_column(dataset.select([2, 0]), "who")) == ["b", "a"]


def test_splits_that_name_clients_in_two_ways_are_refused() -> None:
    both = DatasetDict(train=Dataset.from_dict({"who": ["1"]}), test=Dataset.from_dict({"who": [1]}))
    with pytest.raises(TypeError, match=r"column='who' must have one type, not \['.*string', 'int64'\]"):
        FederatedDataset.from_column(both, "who")


@pytest.mark.parametrize("test_size", [None, 0.3, 2])
def test_examples_are_counted_without_a_client_being_loaded(test_size: Any) -> None:
    populations = [
        FederatedDataset.from_column(rows(), "who", test_size=test_size),
        FederatedDataset.from_partition(rows(), 9, test_size=test_size),
        FederatedDataset({"a": rows(3), "b": DatasetDict(train=rows(1), test=rows(2))}),
        FederatedDataset.from_column(DatasetDict(train=rows(9), test=rows(12)), "who"),
    ]
    for clients in populations:
        for client_id, splits in clients.items():
            for split in ("train", "test"):
                assert clients.num_examples(client_id, split) == len(splits.get(split, ()))
    with pytest.raises(KeyError, match="no client 9 among"):
        populations[1].num_examples(9)


def test_the_ids_of_a_partition_cost_nothing_and_are_looked_up_at_once() -> None:
    clients = FederatedDataset.from_partition(rows(), 5)
    assert clients.ids == range(5)
    assert np.int64(3) in clients
    for other in (5, -1, "3", None, 1.5):
        assert other not in clients


@pytest.mark.parametrize("num_clients", [3, 50])
def test_every_row_is_dealt_to_one_client(num_clients: int) -> None:
    labels = np.repeat(np.arange(5), 40)
    rng = np.random.default_rng(0)
    for dealt in (
        iid(200, num_clients, rng),
        dirichlet(labels, num_clients, rng, 0.05, min_examples=3),
        by_labels(labels, num_clients, rng, 2),
    ):
        assert sorted(dealt.order) == list(range(200))
        assert sum(dealt.count(k) for k in range(num_clients)) == 200
        assert all(len(dealt.rows(k)) == dealt.count(k) >= 1 for k in range(num_clients))


def test_clients_with_too_few_examples_take_from_the_largest() -> None:
    labels = np.zeros(100, dtype=np.int64)
    dealt = dirichlet(labels, 20, np.random.default_rng(0), 0.01, min_examples=4)
    counts = sorted(dealt.count(k) for k in range(20))
    assert counts[0] == 4
    assert sum(counts) == 100


def test_rows_stay_in_their_order_when_they_are_grouped() -> None:
    dealt = Assignment.of(np.array([2, 0, 2, 0, 2]), 4)
    assert [dealt.rows(k).tolist() for k in range(4)] == [[1, 3], [], [0, 2, 4], []]


# The model's table after training


def numbered(**config: Any) -> Any:
    data = Dataset.from_dict(
        {"points": torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).tolist(), "labels": [0, 1, 2] * 4}
    )
    return FederatedDataset.from_partition(data, 6), floral_net(**config)


def test_numbered_clients_need_no_names_in_the_model(tmp_path: Path) -> None:
    clients, model = numbered()
    run = trainer(tmp_path, model=model, dataset=clients, clients_per_round=2, router_learning_rate=5.0)
    run.train()
    assert (model.active_peft_config.num_clients, model.active_peft_config.client_names) == (6, None)
    ids, mixtures = run.mixtures()
    assert ids == list(range(6))
    assert all(torch.equal(model.mixture(k), mixtures[k]) for k in range(6))


def test_a_client_that_never_trained_keeps_its_row(tmp_path: Path) -> None:
    clients, model = numbered(num_clients=6, init_std=0.3)
    start = torch.randn(6, 1, 2)
    model.set_routers(start)
    run = trainer(tmp_path, model=model, dataset=clients, clients_per_round=1, rounds=1, router_learning_rate=5.0)
    run.train()
    changed = (model.router.logits["default"] != start).any(dim=-1).flatten()
    assert changed.sum() == 1
