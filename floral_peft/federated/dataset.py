"""A population of clients, each with its own examples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import ClassLabel, Dataset, DatasetDict, Value

from floral_peft.federated import partition
from floral_peft.federated.files import digest
from floral_peft.federated.seeding import ClientId, derive_seed
from floral_peft.federated.sources import Asked, Dealt, Given, HoldOut, Source
from floral_peft.federated.views import selected_rows


LABEL_COLUMNS = ("labels", "label", "label_ids")
SPLITS = ("train", "test")

#: Client id → true cluster. (The key is Any because a `dict[str, int]` is no `Mapping[str | int, int]`.)
Clusters = Mapping[Any, int]


class Partitioner(Protocol):
    """Anything that deals a dataset out, for example a partitioner of Flower Datasets."""

    @property
    def num_partitions(self) -> int | Callable[[], int]:
        """Number of clients, or a method that tells it."""

    def load_partition(self, partition_id: int, /) -> Dataset | DatasetDict:
        """The examples of one client."""


class FederatedDataset(Mapping[ClientId, DatasetDict]):
    """Client id → the client's splits, "train" and, for evaluation, "test".

    A client's splits are views: row numbers over the dataset's memory-mapped Arrow table, never a copy. They are made
    when they are asked for, so a million clients cost two arrays of row numbers and the list of their ids.

    The order of `ids` is that of the rows of a trained model's router table. In `model(**batch, client_ids=...)` a
    list names clients by id, but a tensor holds rows: positions in `ids`, not the ids themselves, even where those are
    ints.

    ```python
    FederatedDataset({"a": DatasetDict(train=..., test=...), "b": ...}, clusters={"a": 0, "b": 1})
    FederatedDataset.from_column(plays, "speaker", test_size=0.2, seed=0)
    FederatedDataset.from_partition(digits, num_clients=20, scheme="dirichlet", alpha=0.5)
    ```

    Args:
        clients: The clients as a mapping, or as (id, splits) pairs. A client's value is a `datasets.Dataset` (all of
            it for training) or a mapping from "train" and "test" to one, no other splits. Ids are strings or ints.
        clusters: The true cluster of every client, where it is known: an int from 0.

    Raises:
        TypeError: An id, a client's value or a cluster has the wrong type.
        ValueError: No clients, an id given twice, a client without "train", with an unknown split or without examples
            at all, a cluster for an unknown client, or a client without one.
    """

    def __init__(
        self,
        clients: Mapping[Any, Any] | Iterable[tuple[ClientId, Any]],
        clusters: Clusters | None = None,
    ) -> None:
        pairs: Iterable[tuple[ClientId, Any]]
        if isinstance(clients, Mapping):
            pairs = clients.items()
        elif isinstance(clients, Iterable) and not isinstance(clients, (str, Dataset)):
            pairs = _as_pairs(clients)
        else:
            raise TypeError(
                f"clients must map client ids to datasets, got {type(clients).__name__}; "
                "from_column and from_partition deal one dataset out."
            )
        loaded: dict[ClientId, DatasetDict] = {}
        for given_id, splits in pairs:
            client_id = _as_id(given_id)
            if client_id in loaded:
                raise ValueError(f"client {client_id!r} is given twice; ids must be unique.")
            loaded[client_id] = _as_splits(client_id, splits)
        self._setup(list(loaded), Given(list(loaded.values())), clusters)

    @classmethod
    def from_column(
        cls,
        dataset: Dataset | DatasetDict,
        column: str,
        test_size: float | int | None = None,
        seed: int = 0,
        clusters: Clusters | None = None,
    ) -> FederatedDataset:
        """One client per value of a column, which is dropped from the examples (unless it is the label).

        Args:
            dataset: The examples, or a `DatasetDict` of "train" and "test" that both have the column.
            column: Column of strings or ints that names each example's client. Clients come in the order in which
                they first occur.
            test_size: Fraction in (0, 1) or count of each client's examples to hold out for evaluation; at least one
                example stays for training.
            seed: Seed of the held-out examples' choice.
            clusters: The true cluster of every client, where it is known.
        """
        splits = {"train": dataset} if isinstance(dataset, Dataset) else dict(_check_splits("dataset", dataset))
        for split in splits.values():
            if column not in split.column_names:
                raise ValueError(f"column={column!r} is not in the dataset; its columns: {split.column_names}.")
        ids, owners = _by_column(list(splits.values()), column)
        dealt = {
            name: (
                split if column in LABEL_COLUMNS else split.remove_columns(column),
                partition.Assignment.of(owned, len(ids)),
            )
            for (name, split), owned in zip(splits.items(), owners, strict=True)
        }
        held = _hold_out(test_size, seed)
        if test_size is not None and "test" in dealt:
            raise ValueError(f'test_size={test_size} is given, but the dataset has a split "test" already.')
        return cls._of(ids, Dealt(ids, dealt, held), clusters)

    @classmethod
    def from_partition(
        cls,
        dataset: Dataset,
        num_clients: int,
        scheme: Literal["iid", "dirichlet", "labels"] = "iid",
        *,
        label_column: str | None = None,
        alpha: float = 0.5,
        labels_per_client: int = 2,
        min_examples: int = 2,
        test_size: float | int | None = None,
        seed: int = 0,
        clusters: Clusters | None = None,
    ) -> FederatedDataset:
        """Deal one dataset out to clients 0, 1, ..., num_clients − 1.

        Args:
            dataset: The examples.
            num_clients: Number of clients.
            scheme: "iid": shuffled equal parts. "dirichlet": each label dealt out in Dirichlet(`alpha`) proportions.
                "labels": `labels_per_client` labels for each client.
            label_column: Column of class labels; "labels" or "label" by default.
            alpha: Concentration of "dirichlet".
            labels_per_client: Number of labels of a client of "labels".
            min_examples: Fewest examples of a client of "dirichlet", at least 1.
            test_size: Fraction in (0, 1) or count of each client's examples to hold out for evaluation.
            seed: Seed of the partition and of the held-out examples' choice.
            clusters: The true cluster of every client, where it is known.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of its range, or some examples or clients would be left with nobody or
                nothing.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}.")
        num_clients = _as_int("num_clients", num_clients, least=1)
        min_examples = _as_int("min_examples", min_examples, least=1)
        labels_per_client = _as_int("labels_per_client", labels_per_client, least=1)
        held = _hold_out(test_size, seed)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float, np.number)):
            raise TypeError(f"alpha={alpha!r} must be a finite number above 0.")
        if not alpha > 0 or not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha!r} must be a finite number above 0.")
        needed = num_clients * (min_examples if scheme == "dirichlet" else 1)
        if len(dataset) < needed:
            raise ValueError(
                f"num_clients={num_clients}: the dataset's {len(dataset)} examples are too few; {needed} are needed."
            )
        rng = np.random.default_rng(derive_seed(held.seed, "partition"))
        if scheme == "iid":
            dealt = partition.iid(len(dataset), num_clients, rng)
        elif scheme == "dirichlet":
            dealt = partition.dirichlet(_labels(dataset, label_column), num_clients, rng, alpha, min_examples)
        elif scheme == "labels":
            dealt = partition.by_labels(_labels(dataset, label_column), num_clients, rng, labels_per_client)
        else:
            raise ValueError(f'scheme={scheme!r} must be "iid", "dirichlet" or "labels".')
        ids = range(num_clients)
        return cls._of(ids, Dealt(ids, {"train": (dataset, dealt)}, held), clusters)

    @classmethod
    def from_partitioner(
        cls,
        partitioner: Partitioner,
        test_size: float | int | None = None,
        seed: int = 0,
        clusters: Clusters | None = None,
    ) -> FederatedDataset:
        """One client per partition, loaded when it is asked for.

        Args:
            partitioner: Any object with `num_partitions`, an int or a method that gives one, and
                `load_partition(i)`, which gives client i's `Dataset` or its `DatasetDict` of "train" and "test".
            test_size: Fraction in (0, 1) or count of each client's examples to hold out for evaluation.
            seed: Seed of the held-out examples' choice.
            clusters: The true cluster of every client, where it is known.
        """
        for attribute in ("num_partitions", "load_partition"):
            if not hasattr(partitioner, attribute):
                raise TypeError(f"partitioner: {type(partitioner).__name__} has no {attribute}.")
        count: Any = partitioner.num_partitions
        num_clients = _as_int("partitioner.num_partitions", count() if callable(count) else count, least=1)
        ids = range(num_clients)

        def ask(position: int) -> DatasetDict:
            return _as_splits(position, partitioner.load_partition(position))

        return cls._of(ids, Asked(ids, ask, _hold_out(test_size, seed)), clusters)

    @property
    def ids(self) -> Sequence[ClientId]:
        """The clients' ids, in the order in which they were given."""
        return self._ids

    @property
    def clusters(self) -> Mapping[ClientId, int] | None:
        """The true cluster of each client, or None where it is not known."""
        return self._clusters

    def num_examples(self, client_id: ClientId, split: str = "train") -> int:
        """How many examples a client has in a split; 0 without such a split.

        Nothing is loaded for it, but from clients of `from_partitioner`.

        Raises:
            KeyError: There is no such client.
        """
        return self._source.count(self._position(client_id), split)

    def digest(self, with_clusters: bool = False) -> str:
        """A short digest of the clients' ids, in order, and of their true clusters if asked for."""
        if with_clusters not in self._digests:
            clusters = list((self._clusters or {}).items()) if with_clusters else None
            self._digests[with_clusters] = digest(json.dumps([list(self._ids), clusters]).encode())[:12]
        return self._digests[with_clusters]

    def __getitem__(self, client_id: ClientId) -> DatasetDict:
        return self._source.load(self._position(client_id))

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, client_id: object) -> bool:
        return self._found(client_id) is not None

    def __repr__(self) -> str:
        return f"FederatedDataset({len(self)} clients: {_some(self._ids)})"

    @classmethod
    def _of(cls, ids: Sequence[ClientId], source: Source, clusters: Clusters | None) -> FederatedDataset:
        self = cls.__new__(cls)
        self._setup(ids, source, clusters)
        return self

    def _setup(self, ids: Sequence[ClientId], source: Source, clusters: Clusters | None) -> None:
        if not ids:
            raise ValueError("a FederatedDataset needs at least one client.")
        self._ids = ids
        self._source = source
        self._digests: dict[bool, str] = {}
        self._positions = None if isinstance(ids, range) else {client_id: k for k, client_id in enumerate(ids)}
        # Records write ids as text: 1 and "1" would be one client there.
        if self._positions is not None and len({isinstance(client_id, str) for client_id in ids}) == 2:
            twice = next((i for i in ids if isinstance(i, int) and str(i) in self._positions), None)
            if twice is not None:
                raise ValueError(f"client {twice!r} and client {str(twice)!r} read alike; ids must differ as text.")
        self._clusters = _check_clusters(clusters, self)

    def _position(self, client_id: object) -> int:
        position = self._found(client_id)
        if position is None:
            raise KeyError(f"no client {client_id!r} among the {len(self)} clients {_some(self._ids)}")
        return position

    def _found(self, client_id: object) -> int | None:
        """A client's position in `ids`, or None."""
        if self._positions is not None:
            return self._positions.get(client_id)  # type: ignore[call-overload]
        if isinstance(client_id, (int, np.integer)) and 0 <= client_id < len(self._ids):
            return int(client_id)
        return None


def _as_pairs(clients: Iterable[Any]) -> Iterator[tuple[ClientId, Any]]:
    for item in clients:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(f"clients must be a mapping or (id, splits) pairs, got {type(item).__name__} in it.")
        yield item[0], item[1]


def _as_id(client_id: Any) -> ClientId:
    if isinstance(client_id, bool) or not isinstance(client_id, (str, int, np.integer)):
        raise TypeError(f"client id {client_id!r} must be a string or an int, not {type(client_id).__name__}.")
    return str(client_id) if isinstance(client_id, str) else int(client_id)


def _as_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r} must be an int of at least {least}.")
    if value < least:
        raise ValueError(f"{name}={value!r} must be an int of at least {least}.")
    return int(value)


def _check_splits(who: str, splits: object) -> Mapping[str, Dataset]:
    expected = 'a datasets.Dataset or a mapping of "train" and "test" to one'
    if not isinstance(splits, Mapping):
        raise TypeError(f"{who}: expected {expected}, got {type(splits).__name__}.")
    for name, split in splits.items():
        if not isinstance(split, Dataset):
            raise TypeError(f"{who}: expected {expected}, got {type(split).__name__} as {name!r}.")
    if "train" not in splits:
        raise ValueError(f'{who} has no split "train"; its splits: {sorted(map(str, splits))}.')
    unknown = [name for name in splits if name not in SPLITS]
    if unknown:
        raise ValueError(
            f'{who} has a split {unknown[0]!r}; "train" and "test" are known. Rename the split or leave it out.'
        )
    return splits


def _as_splits(client_id: ClientId, splits: object) -> DatasetDict:
    who = f"client {client_id!r}"
    found = DatasetDict(train=splits) if isinstance(splits, Dataset) else DatasetDict(_check_splits(who, splits))
    if not any(len(split) for split in found.values()):
        raise ValueError(f"{who} has no examples; leave the client out.")
    return found


def _hold_out(test_size: float | int | None, seed: int) -> HoldOut:
    expected = f"test_size={test_size!r} must be a fraction in (0, 1), a count of at least 1, or None."
    if test_size is not None:
        if isinstance(test_size, bool) or not isinstance(test_size, (int, float)):
            raise TypeError(expected)
        if not (0 < test_size < 1 if isinstance(test_size, float) else test_size >= 1):
            raise ValueError(expected)
    return HoldOut(test_size, _as_int("seed", seed, least=0))


def _check_clusters(clusters: Clusters | None, known: Mapping[ClientId, Any]) -> Mapping[ClientId, int] | None:
    if clusters is None:
        return None
    if not isinstance(clusters, Mapping):
        raise TypeError(f"clusters must map client ids to cluster numbers, got {type(clusters).__name__}.")
    for client_id, cluster in clusters.items():
        if client_id not in known:
            raise ValueError(f"clusters names client {client_id!r}, which the dataset does not have.")
        if isinstance(cluster, bool) or not isinstance(cluster, (int, np.integer)) or cluster < 0:
            raise TypeError(f"client {client_id!r}: cluster {cluster!r} must be an int of at least 0.")
    missing = [client_id for client_id in known if client_id not in clusters]
    if missing:
        raise ValueError(f"clusters leaves out {len(missing)} clients: {_some(sorted(missing, key=str))}.")
    return {_as_id(client_id): int(cluster) for client_id, cluster in clusters.items()}


def _labels(dataset: Dataset, column: str | None) -> np.ndarray:
    found = column or next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)
    if found is None:
        raise ValueError(
            f"which column holds the labels? There is none of {', '.join(LABEL_COLUMNS)} among the dataset's "
            f"{dataset.column_names}: give label_column."
        )
    if found not in dataset.column_names:
        raise ValueError(f"label_column={found!r} is not in the dataset; its columns: {dataset.column_names}.")
    if not isinstance(dataset.features[found], (Value, ClassLabel)):
        raise TypeError(f"label_column={found!r} must hold one label an example, not {dataset.features[found]!r}.")
    values, rows = dataset.data.column(found), selected_rows(dataset)
    missing = np.count_nonzero(values.is_null().to_numpy()[rows])
    if missing:
        raise ValueError(f"label_column={found!r} lacks the label of {missing} examples.")
    return np.asarray(values.to_numpy()[rows])


def _by_column(splits: Sequence[Dataset], column: str) -> tuple[list[ClientId], list[np.ndarray]]:
    """The values of a column in several splits, and in each of them the position of each row's value among these."""
    columns = [split.data.column(column) for split in splits]
    kind = columns[0].type
    if pa.types.is_nested(kind):
        raise TypeError(f"column={column!r} holds {kind}: a client's id is a string or an int.")
    if any(other.type != kind for other in columns):
        raise TypeError(f"column={column!r} must have one type, not {[str(other.type) for other in columns]}.")
    firsts = np.cumsum([0, *map(len, columns)])
    rows = [first + selected_rows(split) for first, split in zip(firsts, splits, strict=False)]
    values = pa.chunked_array([chunk for other in columns for chunk in other.chunks], type=kind)
    ids, owners = partition.by_value(values, np.concatenate(rows), column)
    return ids, np.split(owners, np.cumsum([len(split) for split in splits])[:-1])


def _some(ids: Sequence[ClientId], most: int = 5) -> str:
    shown = ", ".join(repr(client_id) for client_id in ids[:most])
    return shown + (", ..." if len(ids) > most else "")
