"""The clients of a chunk, each with its own examples and order, and which of them take their next step together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from floral_peft.federated.batches import Batch, Examples, as_columns
from floral_peft.federated.draws import ClientGenerators
from floral_peft.federated.stacked_optimizer import Chosen


class Lane:
    """One client of a chunk while it trains.

    Args:
        position: Its place among the clients of the chunk.
        examples: Its training examples.
        generators: Its random generators.
        order: The generator of its examples' order.
        constants: What its batches hold beside examples.

    Attributes:
        row: Its place in the stacked tensors.
        rows: The rows of its next batch, numbered through a `Pack` if it is in one; None when it takes no more steps.
        batch: Its next batch, if it is in no `Pack`.
        batch_size: The examples in that batch.
        signature: The shapes in that batch: clients in which they are alike can step together.
        epoch: The number of that batch's epoch.
        examples_seen: Examples in this phase's batches, that one included.
        failed: Whether it left on the way.
    """

    def __init__(
        self,
        position: int,
        examples: Examples,
        generators: ClientGenerators,
        order: torch.Generator,
        constants: Batch | None = None,
    ) -> None:
        self.position = position
        self.examples: Examples | None = examples
        self.num_examples = len(examples)
        self.generators = generators
        self.order = order
        self.constants = constants or {}
        self.row = -1
        self.first_row = 0
        self.failed = False

    def begin(self, batches: Iterator[Tensor], batch_size: int) -> None:
        """Make the first batch of a phase ready.

        Args:
            batches: The rows of the phase's batches.
            batch_size: Most examples in one of them.
        """
        self._batches = batches
        self._full = batch_size
        self.epoch = self.examples_seen = 0
        self.advance()

    def advance(self) -> None:
        """Make the next batch ready. A client whose examples cannot be read leaves."""
        self.rows: Tensor | None = None
        self.batch: Batch | None = None
        rows = None if self.failed else next(self._batches, None)
        if rows is None:
            return
        self.rows, self.batch_size = rows, len(rows)
        self.epoch = self.examples_seen // self.num_examples
        self.examples_seen += len(rows)
        if self.examples is None:
            self.signature: Any = len(rows)
            self.rows = rows + self.first_row
            return
        try:
            with self.generators.in_use():
                self.batch = self.examples.batch(rows)
            self.signature = _shapes(self.batch)
        except Exception:  # told when the client is trained alone
            self.leave()

    def leave(self) -> None:
        """Take no more steps here."""
        self.failed, self.rows, self.batch = True, None, None


class Pack:
    """The examples of several clients in one tensor per column, so that a step's batches are one selection of rows.

    Args:
        lanes: Clients whose examples are in memory, with the same columns. They hold them no longer.
        device: Where the batches go.
    """

    def __init__(self, lanes: Sequence[Lane], device: torch.device) -> None:
        held = [lane.examples.arrays for lane in lanes if lane.examples is not None and lane.examples.arrays]
        self._columns = as_columns(held, device)
        self._device = device
        self._room: dict[str, Tensor] = {}  # for the batches: new memory for each would cost more than filling it
        first = 0
        for lane in lanes:
            lane.examples, lane.first_row = None, first
            first += lane.num_examples

    def batch(self, lanes: Sequence[Lane]) -> Batch:
        """The lanes' next batches, (clients, examples, ...), until the next call."""
        rows = torch.cat([lane.rows for lane in lanes if lane.rows is not None])
        on_device = rows.to(self._device)
        batch = {}
        for name, column in self._columns.items():
            if name not in self._room or len(self._room[name]) < len(rows):
                self._room[name] = column.new_empty(len(rows), *column.shape[1:])
            torch.index_select(column, 0, on_device, out=self._room[name][: len(rows)])
            batch[name] = self._room[name][: len(rows)].unflatten(0, (len(lanes), -1))
        return batch


def pack(lanes: Sequence[Lane], device: torch.device) -> Pack | None:
    """A pack of these clients; None where their examples are not all in memory, with the same columns."""
    splits = [lane.examples.arrays if lane.examples is not None else None for lane in lanes]
    kinds = {
        None if split is None else tuple((name, value.dtype, value.shape[1:]) for name, value in sorted(split.items()))
        for split in splits
    }
    return None if len(kinds) > 1 or kinds & {None, ()} else Pack(lanes, device)


def stacked_batch(lanes: Sequence[Lane], packed: Pack | None) -> Batch:
    """The next batches of lanes of one signature, (clients, examples, ...)."""
    constants = _stacked([lane.constants for lane in lanes])
    if packed is not None:
        return packed.batch(lanes) | constants
    return _stacked([lane.batch for lane in lanes if lane.batch is not None]) | constants


def _stacked(batches: Sequence[Batch]) -> Batch:
    return {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}


def next_group(lanes: Sequence[Lane]) -> list[Lane]:
    """The clients that take the next step together; empty when all have ended.

    They have batches of the same shapes, the most frequent ones among the clients that lag most. So clients with more
    examples than others do not keep those from waiting for each other at the smaller last batch of an epoch.
    """
    waiting = [lane for lane in lanes if lane.rows is not None]
    if not waiting:
        return []
    epoch = min(lane.epoch for lane in waiting)
    signature = Counter(lane.signature for lane in waiting if lane.epoch == epoch).most_common(1)[0][0]
    return [lane for lane in waiting if lane.signature == signature]


def chosen_rows(lanes: Sequence[Lane]) -> Chosen:
    """The lanes' rows in the stacked tensors: a slice, which is a view, where they stand in a row."""
    rows = [lane.row for lane in lanes]
    first, count = rows[0], len(rows)
    if rows == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(rows)


def _shapes(batch: Batch) -> tuple[Any, ...]:
    """Name, dtype and shape of each tensor."""
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise TypeError(f'the batch\'s "{name}" is a {type(value).__name__}: only tensors can be stacked')
    return tuple((name, value.dtype, tuple(value.shape)) for name, value in sorted(batch.items()))
