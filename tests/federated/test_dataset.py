"""FederatedDataset: who has which examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from floral_peft.federated import FederatedDataset


def rows(count: int = 12) -> Dataset:
    return Dataset.from_dict(
        {
            "row": list(range(count)),
            "speaker": [f"speaker {row % 3}" for row in range(count)],
            "label": [row % 4 for row in range(count)],
        }
    )


def all_rows(clients: FederatedDataset) -> list[int]:
    return sorted(row for splits in clients.values() for split in splits.values() for row in split["row"])


def test_a_mapping_is_taken_as_it_is() -> None:
    clients = FederatedDataset({"a": DatasetDict(train=rows(4), test=rows(2)), 7: rows(3)}, clusters={"a": 0, 7: 1})
    assert list(clients) == ["a", 7]
    assert [len(clients["a"]["train"]), len(clients["a"]["test"]), len(clients[7]["train"])] == [4, 2, 3]
    assert clients.clusters == {"a": 0, 7: 1}
    assert "a" in clients
    assert "b" not in clients


def test_a_column_names_the_clients_and_is_dropped() -> None:
    clients = FederatedDataset.from_column(rows(), "speaker")
    assert list(clients) == ["speaker 0", "speaker 1", "speaker 2"]
    assert clients["speaker 1"]["train"]["row"][:] == [1, 4, 7, 10]
    assert clients["speaker 1"]["train"].column_names == ["row", "label"]


def test_a_label_can_name_the_clients_and_is_kept() -> None:
    assert "label" in FederatedDataset.from_column(rows(), "label")[2]["train"].column_names


def test_a_column_of_lists_names_no_clients() -> None:
    data = Dataset.from_dict({"x": [1, 2], "client": [[0], [1]]})
    with pytest.raises(
        TypeError, match="column='client' holds list<item: int64>: a client's id is a string or an int"
    ):
        FederatedDataset.from_column(data, "client")


def test_a_column_of_two_splits_gives_clients_of_either() -> None:
    both = DatasetDict(train=rows(4), test=rows(12).select([0, 5, 2]))
    both["test"] = both["test"].map(lambda example: {"speaker": "late" if example["row"] == 2 else example["speaker"]})
    clients = FederatedDataset.from_column(both, "speaker")
    assert set(clients) == {"speaker 0", "speaker 1", "speaker 2", "late"}
    assert len(clients["late"]["train"]) == 0
    assert clients["late"]["test"]["row"][:] == [2]


@pytest.mark.parametrize(("test_size", "held"), [(0.25, 1), (0.5, 2), (1, 1), (100, 3)])
def test_held_out_examples_are_the_clients_own_and_leave_one_to_train(test_size: Any, held: int) -> None:
    clients = FederatedDataset.from_column(rows(), "speaker", test_size=test_size)
    assert all(len(splits["test"]) == held for splits in clients.values())
    assert all_rows(clients) == list(range(12))


def test_a_client_of_one_example_trains_on_it() -> None:
    clients = FederatedDataset.from_column(rows(3), "speaker", test_size=0.9)
    assert all(len(splits["train"]) == 1 and "test" not in splits for splits in clients.values())


def test_the_held_out_choice_depends_on_the_seed_and_the_client_only() -> None:
    def held(seed: int, clients: FederatedDataset | None = None) -> list[int]:
        found = clients or FederatedDataset.from_column(rows(30), "speaker", test_size=0.5, seed=seed)
        return list(found["speaker 1"]["test"]["row"][:])

    assert held(0) == held(0) != held(1)
    fewer = rows(30).filter(lambda example: example["speaker"] != "speaker 0")
    assert held(0) == held(0, FederatedDataset.from_column(fewer, "speaker", test_size=0.5, seed=0))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "labels"])
def test_a_partition_gives_every_row_to_one_client(scheme: Any) -> None:
    clients = FederatedDataset.from_partition(rows(40), num_clients=4, scheme=scheme, test_size=0.2, seed=3)
    assert list(clients) == [0, 1, 2, 3]
    assert all_rows(clients) == list(range(40))
    again = FederatedDataset.from_partition(rows(40), num_clients=4, scheme=scheme, test_size=0.2, seed=3)
    assert all(clients[k]["train"]["row"][:] == again[k]["train"]["row"][:] for k in clients)


def test_iid_parts_are_equal() -> None:
    clients = FederatedDataset.from_partition(rows(10), num_clients=4)
    assert sorted(len(splits["train"]) for splits in clients.values()) == [2, 2, 3, 3]


def test_a_small_alpha_gives_few_labels_and_nobody_nothing() -> None:
    few = FederatedDataset.from_partition(rows(400), num_clients=20, scheme="dirichlet", alpha=0.01, seed=0)
    many = FederatedDataset.from_partition(rows(400), num_clients=20, scheme="dirichlet", alpha=1e4, seed=0)

    def mean_kinds(clients: FederatedDataset) -> float:
        return float(np.mean([len(set(splits["train"]["label"][:])) for splits in clients.values()]))

    assert mean_kinds(few) < 2.5
    assert mean_kinds(many) == 4
    assert min(len(splits["train"]) for splits in few.values()) >= 2


@pytest.mark.parametrize("labels_per_client", [1, 2, 4])
def test_clients_by_labels_hold_as_many_labels_as_asked(labels_per_client: int) -> None:
    clients = FederatedDataset.from_partition(
        rows(80), num_clients=8, scheme="labels", labels_per_client=labels_per_client
    )
    assert {len(set(splits["train"]["label"][:])) for splits in clients.values()} == {labels_per_client}


def test_numpy_s_integers_are_ints() -> None:
    parts = FederatedDataset.from_partition(rows(), np.int64(3), seed=np.int64(1))  # type: ignore[arg-type]
    assert [type(client_id) for client_id in parts] == [int] * 3
    named = FederatedDataset({np.int64(7): rows(2)}, clusters={np.int64(7): 1})
    assert list(named) == [7]
    assert named.clusters == {7: 1}
    assert {type(client_id) for client_id in [*named, *named.clusters]} == {int}


class Halves:
    num_partitions = 2

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def load_partition(self, partition_id: int) -> Dataset:
        self.loaded.append(partition_id)
        return rows(8).shard(2, partition_id)


def test_any_partitioner_serves_and_is_asked_when_needed() -> None:
    halves = Halves()
    clients = FederatedDataset.from_partitioner(halves, test_size=0.5)
    assert halves.loaded == []
    assert len(clients[1]["test"]) == 2
    assert halves.loaded == [1]


def test_a_partitioner_may_tell_its_number_by_a_method() -> None:
    class Counted(Halves):
        num_partitions = lambda self: 2  # type: ignore[assignment]  # noqa: E731

    assert list(FederatedDataset.from_partitioner(Counted())) == [0, 1]


def test_splits_are_views_of_the_dataset() -> None:
    source = rows(1000)
    clients = FederatedDataset.from_partition(source, num_clients=10, test_size=0.5)

    def address(dataset: Dataset) -> int:
        return int(dataset.data.column("row").chunk(0).buffers()[1].address)

    assert {address(split) for splits in clients.values() for split in splits.values()} == {address(source)}


@pytest.mark.parametrize("client_id", ["../x", "/etc/x", "a\0b", "a\nb", "x" * 300, "con", "", "é", "é", -5])
def test_any_text_or_number_can_name_a_client(client_id: Any) -> None:
    assert len(FederatedDataset({client_id: rows(2)})[client_id]["train"]) == 2


empty = rows().select([])
# Mistakes are made on purpose below: no type checker may see them.
Clients: Any = FederatedDataset
MISTAKES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Clients({}), ValueError, "at least one client"),
    (lambda: Clients(rows()), TypeError, "clients must map client ids to datasets, got Dataset"),
    (lambda: Clients("a"), TypeError, "got str"),
    (lambda: Clients([rows()]), TypeError, "pairs, got Dataset"),
    (lambda: Clients([("a", rows()), ("a", rows())]), ValueError, "client 'a' is given twice"),
    (lambda: Clients({1: rows(), "1": rows()}), ValueError, "client 1 and client '1' read alike"),
    (lambda: Clients({1.5: rows()}), TypeError, "client id 1.5 must be a string or an int, not float"),
    (lambda: Clients({True: rows()}), TypeError, "client id True"),
    (lambda: Clients({"a": [1, 2]}), TypeError, "client 'a': expected a datasets.Dataset.*got list"),
    (lambda: Clients({"a": {"train": [1]}}), TypeError, "client 'a'.*got list as 'train'"),
    (lambda: Clients({"a": {"test": rows()}}), ValueError, "client 'a' has no split \"train\".*'test'"),
    (lambda: Clients({"a": {"train": rows(), "tst": rows()}}), ValueError, "client 'a' has a split 'tst'; \"train\""),
    (
        lambda: Clients.from_column(DatasetDict(train=rows(), validation=rows()), "speaker"),
        ValueError,
        "dataset has a split 'validation'",
    ),
    (lambda: Clients({"a": empty}), ValueError, "client 'a' has no examples"),
    (lambda: Clients({"a": {"train": empty, "test": empty}}), ValueError, "client 'a' has no examples"),
    (lambda: Clients({"a": rows()}, clusters={"b": 0}), ValueError, "names client 'b'"),
    (lambda: Clients({"a": rows(), "b": rows()}, clusters={"a": 0}), ValueError, "leaves out 1 clients: 'b'"),
    (lambda: Clients({"a": rows()}, clusters={"a": -1}), TypeError, "client 'a': cluster -1"),
    (lambda: Clients({"a": rows()}, clusters={"a": "x"}), TypeError, "client 'a': cluster 'x'"),
    (lambda: Clients({"a": rows()}, clusters=[0]), TypeError, "clusters must map"),
    (lambda: Clients({"a": rows()})["b"], KeyError, "no client 'b' among the 1 clients 'a'"),
    (lambda: Clients.from_column(rows(), "actor"), ValueError, "column='actor'.*'row', 'speaker', 'label'"),
    (lambda: Clients.from_column([1], "actor"), TypeError, "got list"),
    (lambda: Clients.from_column(empty, "speaker"), ValueError, "at least one client"),
    (lambda: Clients.from_column(rows(), "speaker", test_size=1.0), ValueError, "test_size=1.0"),
    (lambda: Clients.from_column(rows(), "speaker", test_size=float("nan")), ValueError, "test_size=nan"),
    (lambda: Clients.from_column(rows(), "speaker", test_size=0), ValueError, "test_size=0"),
    (lambda: Clients.from_column(rows(), "speaker", test_size="x"), TypeError, "test_size='x'"),
    (
        lambda: Clients.from_column(DatasetDict(train=rows(), test=rows()), "speaker", test_size=0.5),
        ValueError,
        'a split "test" already',
    ),
    (
        lambda: Clients.from_column(Dataset.from_dict({"x": [1.5]}), "x"),
        TypeError,
        "column='x', row 0: 1.5 must be a string or an int",
    ),
    (lambda: Clients.from_partition([1], 2), TypeError, "dataset must be a datasets.Dataset, got list"),
    (lambda: Clients.from_partition(rows(), 0), ValueError, "num_clients=0"),
    (lambda: Clients.from_partition(rows(), 2.0), TypeError, "num_clients=2.0"),
    (lambda: Clients.from_partition(rows(), 2, seed="x"), TypeError, "seed='x'"),
    (lambda: Clients.from_partition(rows(), 2, seed=1.5), TypeError, "seed=1.5"),
    (lambda: Clients.from_column(rows(), "speaker", seed=None), TypeError, "seed=None"),
    (lambda: Clients.from_partitioner(Halves(), seed=-1), ValueError, "seed=-1"),
    (lambda: Clients.from_partition(rows(), 2, "dirichlet", min_examples=0), ValueError, "min_examples=0"),
    (lambda: Clients.from_partition(rows(), 2, "dirichlet", min_examples="3"), TypeError, "min_examples='3'"),
    (lambda: Clients.from_partition(rows(), 2, "dirichlet", alpha="x"), TypeError, "alpha='x'"),
    (lambda: Clients.from_partition(rows(), 2, "labels", labels_per_client=2.0), TypeError, "labels_per_client=2.0"),
    (lambda: Clients.from_partition(rows(), 13), ValueError, "12 examples are too few; 13 are needed"),
    (lambda: Clients.from_partition(rows(), 2, "random"), ValueError, "scheme='random'"),
    (lambda: Clients.from_partition(rows(), 2, "dirichlet", alpha=0.0), ValueError, "alpha=0.0"),
    (lambda: Clients.from_partition(rows(), 2, "labels", labels_per_client=5), ValueError, "5 is more.* 4 labels"),
    (
        lambda: Clients.from_partition(rows(), 2, "labels", labels_per_client=1),
        ValueError,
        "num_clients=2 with labels_per_client=1 hold 2 of the dataset's 4 labels",
    ),
    (
        lambda: Clients.from_partition(rows(16).select([0, 4, 8, 12, 1, 2, 3]), 7, "labels", labels_per_client=1),
        ValueError,
        "num_clients=7 with labels_per_client=1 leave . clients without examples",
    ),
    (
        lambda: Clients.from_partition(rows().add_column("kinds", [[1]] * 12), 2, "labels", label_column="kinds"),
        TypeError,
        "label_column='kinds' must hold one label an example, not List",
    ),
    (
        lambda: Clients.from_partition(rows().add_column("kind", [1, None] * 6), 2, "labels", label_column="kind"),
        ValueError,
        "label_column='kind' lacks the label of 6 examples",
    ),
    (
        lambda: Clients.from_partition(rows().remove_columns("label"), 2, "labels"),
        ValueError,
        "which column holds the labels.*give label_column",
    ),
    (lambda: Clients.from_partitioner(3), TypeError, "int has no num_partitions"),
]


@pytest.mark.parametrize(("mistake", "kind", "message"), MISTAKES)
def test_a_mistake_is_named(mistake: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        mistake()
