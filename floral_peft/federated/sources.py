"""Where a FederatedDataset's examples come from, by the clients' positions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, DatasetDict

from floral_peft.federated.partition import Assignment, Rows, hold_out, test_count
from floral_peft.federated.seeding import ClientId, derive_seed
from floral_peft.federated.views import Place, Viewed


class Source(Protocol):
    """The examples of clients 0, 1, ..."""

    def load(self, position: int) -> DatasetDict:
        """A client's splits."""

    def count(self, position: int, split: str) -> int:
        """How many examples a client has in a split; 0 without such a split."""


@dataclass(frozen=True)
class HoldOut:
    """Which of a client's examples are for evaluation: its own random choice, whoever else there is.

    Args:
        size: A fraction in (0, 1), a count, or None to hold out nothing.
        seed: Seed of the choice.
    """

    size: float | int | None
    seed: int

    def split(self, rows: Rows, client_id: ClientId) -> dict[str, Rows]:
        """The client's rows as "train" and, if any are held out, "test"."""
        held = test_count(len(rows), self.size)
        if held == 0:
            return {"train": rows}
        return hold_out(rows, held, np.random.default_rng(derive_seed(self.seed, "test", client_id)))

    def count(self, num_examples: int, split: str) -> int:
        """How many of a client's examples go to a split."""
        held = test_count(num_examples, self.size)
        return {"train": num_examples - held, "test": held}.get(split, 0)


class Given:
    """Clients whose splits the user gave one by one."""

    def __init__(self, clients: Sequence[DatasetDict]) -> None:
        self._clients = clients

    def load(self, position: int) -> DatasetDict:
        """A client's splits."""
        return self._clients[position]

    def count(self, position: int, split: str) -> int:
        """How many examples a client has in a split."""
        return len(self._clients[position].get(split, ()))


#: Where the rows of so many clients lie is kept: to find it takes longer than a step of a small model.
PLACES = 1024


class Dealt:
    """Clients who have rows of one dataset, or of one per split.

    Args:
        ids: The clients' ids.
        splits: Split → the dataset and who has which of its rows.
        held: What of "train" is for evaluation.
    """

    def __init__(
        self, ids: Sequence[ClientId], splits: Mapping[str, tuple[Dataset, Assignment]], held: HoldOut
    ) -> None:
        self._ids = ids
        self._splits = {name: (Viewed(dataset), assignment) for name, (dataset, assignment) in splits.items()}
        self._held = held
        self._places: OrderedDict[int, dict[str, tuple[Viewed, Place]]] = OrderedDict()

    def load(self, position: int) -> DatasetDict:
        """A client's splits, as views."""
        if position not in self._places:
            self._places[position] = self._located(position)
            if len(self._places) > PLACES:
                self._places.popitem(last=False)
        self._places.move_to_end(position)
        return DatasetDict({name: viewed.at(place) for name, (viewed, place) in self._places[position].items()})

    def _located(self, position: int) -> dict[str, tuple[Viewed, Place]]:
        found: dict[str, tuple[Viewed, Place]] = {}
        for name, (dataset, assignment) in self._splits.items():
            rows = assignment.rows(position)
            parts = self._held.split(rows, self._ids[position]) if name == "train" else {name: rows}
            found |= {part: (dataset, dataset.locate(chosen)) for part, chosen in parts.items()}
        return found

    def count(self, position: int, split: str) -> int:
        """How many examples a client has in a split."""
        if split in self._splits and split != "train":
            return self._splits[split][1].count(position)
        return self._held.count(self._splits["train"][1].count(position), split)


class Asked:
    """Clients whose splits are loaded when they are asked for.

    Args:
        ids: The clients' ids.
        ask: A client's position → its splits.
        held: What of "train" is for evaluation.
    """

    def __init__(self, ids: Sequence[ClientId], ask: Callable[[int], DatasetDict], held: HoldOut) -> None:
        self._ids = ids
        self._ask = ask
        self._held = held

    def load(self, position: int) -> DatasetDict:
        """A client's splits."""
        splits: Any = self._ask(position)
        rows = self._held.split(np.arange(len(splits["train"])), self._ids[position])
        if len(rows) == 1:
            return splits
        train = Viewed(splits["train"])
        return DatasetDict({name: train.view(chosen) for name, chosen in rows.items()})

    def count(self, position: int, split: str) -> int:
        """How many examples a client has in a split: the client is loaded for it."""
        return len(self.load(position).get(split, ()))
