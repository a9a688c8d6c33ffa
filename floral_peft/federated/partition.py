"""Ways to deal a dataset's rows out to clients: pure functions from labels to row numbers."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from floral_peft.federated.seeding import ClientId


Rows = np.ndarray  # int64 row numbers


@dataclass(frozen=True)
class Assignment:
    """Who has which rows: two arrays, however many clients there are.

    Args:
        order: All rows, client by client, shape (rows,).
        starts: Where each client's rows start in `order`, and where the last one's end, shape (clients + 1,).
    """

    order: Rows
    starts: np.ndarray

    @classmethod
    def of(cls, owners: np.ndarray, num_clients: int) -> Assignment:
        """Group rows by their owners, a client's position for each row. A client's rows stay in their order."""
        starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=num_clients))])
        return cls(np.argsort(owners, kind="stable"), starts)

    def rows(self, client: int) -> Rows:
        """The rows of the client at a position."""
        return self.order[self.starts[client] : self.starts[client + 1]]

    def count(self, client: int) -> int:
        """How many rows the client at a position has."""
        return int(self.starts[client + 1] - self.starts[client])


def by_value(values: pa.ChunkedArray, chosen: Rows, column: str) -> tuple[list[ClientId], np.ndarray]:
    """The distinct values of a column in the order in which they first occur, and for each row the one that it holds.

    Args:
        values: The column.
        chosen: The rows that count, in order.
        column: Its name, for errors.

    Returns:
        The values; and the position of each row's value among them, int64, shape (rows,).

    Raises:
        TypeError: A value is neither a string nor an int.
    """
    if len(chosen) == 0:
        return [], chosen
    if pa.types.is_string(values.type):  # one chunk may be too long for 32-bit offsets
        values = values.cast(pa.large_string())
    encoded = values.combine_chunks().dictionary_encode()  # chunk by chunk, each would have a dictionary of its own
    codes = encoded.indices.fill_null(-1).to_numpy()[chosen]
    is_name = pa.types.is_integer(values.type) or pa.types.is_large_string(values.type)
    if not is_name or codes.min() < 0:
        row = int(np.argmax(codes < 0)) if is_name else 0
        value = values[int(chosen[row])].as_py()
        raise TypeError(f"column={column!r}, row {row}: {value!r} must be a string or an int to name a client.")
    found, first, codes = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return encoded.dictionary.take(pa.array(found[order])).to_pylist(), position[codes]


def iid(num_rows: int, num_clients: int, rng: np.random.Generator) -> Assignment:
    """Shuffle the rows and cut them into equal parts (sizes differ by at most one)."""
    order = rng.permutation(num_rows)
    return Assignment(order, np.concatenate([[0], np.cumsum(_equal_sizes(num_rows, num_clients))]))


def dirichlet(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float, min_examples: int
) -> Assignment:
    """Deal each label's rows out in proportions drawn from Dirichlet(alpha) (Hsu et al., arXiv 1909.06335).

    Clients that come out with fewer than `min_examples` rows take rows from the largest clients.

    Args:
        labels: The label of each row.
        num_clients: Number of clients.
        rng: Source of randomness.
        alpha: Concentration: small values give clients few labels each, large ones give iid clients.
        min_examples: Fewest rows of a client.
    """
    owners = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(rows)).astype(int)
        owners[rows] = np.searchsorted(cuts, np.arange(len(rows)), side="right")
    shuffled = rng.permutation(len(labels))
    dealt = Assignment.of(owners[shuffled], num_clients)
    dealt = Assignment(shuffled[dealt.order], dealt.starts)
    _top_up(owners, dealt, min_examples)
    return Assignment.of(owners, num_clients)


def by_labels(labels: np.ndarray, num_clients: int, rng: np.random.Generator, labels_per_client: int) -> Assignment:
    """Give each client rows of `labels_per_client` labels only (McMahan et al., arXiv 1602.05629).

    Client k holds the labels k·n, k·n + 1, ... (mod the number of labels) in a shuffled order of labels; the clients
    that hold a label share its rows equally.

    Raises:
        ValueError: There are fewer labels than a client is to hold, a label that nobody would hold, or a client that
            would get no rows.
    """
    kinds = rng.permutation(np.unique(labels))
    if labels_per_client > len(kinds):
        raise ValueError(f"labels_per_client={labels_per_client} is more than the dataset's {len(kinds)} labels.")
    asked = f"num_clients={num_clients} with labels_per_client={labels_per_client}"
    if num_clients * labels_per_client < len(kinds):
        raise ValueError(
            f"{asked} hold {num_clients * labels_per_client} of the dataset's {len(kinds)} labels: the other examples "
            "would go to nobody. Ask for more of either, or leave those labels out of the dataset."
        )
    held = (np.arange(num_clients)[:, None] * labels_per_client + np.arange(labels_per_client)) % len(kinds)
    owners = np.empty(len(labels), dtype=np.int64)
    for position, label in enumerate(kinds):
        holders = np.flatnonzero((held == position).any(axis=1))
        rows = rng.permutation(np.flatnonzero(labels == label))
        owners[rows] = np.repeat(holders, _equal_sizes(len(rows), len(holders)))
    empty = num_clients - len(np.unique(owners))
    if empty:
        raise ValueError(
            f"{asked} leave {empty} clients without examples: their labels have fewer examples than clients that "
            "share them. Ask for fewer clients or more labels for each."
        )
    return Assignment.of(owners, num_clients)


def _equal_sizes(num_rows: int, parts: int) -> np.ndarray:
    """Sizes of parts that differ by at most one, the larger ones first."""
    return num_rows // parts + (np.arange(parts) < num_rows % parts)


def _top_up(owners: np.ndarray, dealt: Assignment, least: int) -> None:
    """Give every client at least so many rows, one by one the last one of whoever has most."""
    counts = np.diff(dealt.starts)
    most = [(-int(count), client) for client, count in enumerate(counts)]
    heapq.heapify(most)
    for client in np.flatnonzero(counts < least):
        for _ in range(least - int(counts[client])):
            count, richest = most[0]
            owners[dealt.order[dealt.starts[richest] - count - 1]] = client
            heapq.heapreplace(most, (count + 1, richest))


def test_count(num_examples: int, test_size: float | int | None) -> int:
    """How many of a client's examples are held out; at least one always stays for training.

    Args:
        num_examples: The client's examples.
        test_size: A fraction in (0, 1), a count, or None to hold out nothing.
    """
    if test_size is None:
        return 0
    wanted = round(test_size * num_examples) if isinstance(test_size, float) else test_size
    return max(0, min(wanted, num_examples - 1))


def hold_out(rows: Rows, held: int, rng: np.random.Generator) -> dict[str, Rows]:
    """Choose rows at random for "test"; the others are "train". Both stay in their order."""
    order = rng.permutation(len(rows))
    return {"train": rows[np.sort(order[held:])], "test": rows[np.sort(order[:held])]}
