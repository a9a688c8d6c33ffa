"""A client's examples as batches of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from datasets.formatting import query_table
from torch import Tensor
from transformers import default_data_collator

from floral_peft.federated.dataset import LABEL_COLUMNS
from floral_peft.federated.label_prior import labels_of
from floral_peft.federated.readings import Readings
from floral_peft.federated.transforms import BatchTransform
from floral_peft.federated.views import Viewed


Batch = dict[str, Any]
Collator = Callable[[list[Any]], Any]

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)

#: Splits up to this size are turned into tensors once for a client's whole visit, not batch by batch.
RESIDENT_BYTES = 256 * 2**20

#: Batches that are fetched from resident tensors at once.
BATCHES_AHEAD = 16


class Examples:
    """One split of one client, ready to be cut into batches.

    With transformers' default collator and plain numbers in the columns, the split becomes tensors once and a batch is
    a selection of rows, which a [`BatchTransform`] may change. Otherwise each batch is fetched from the dataset and
    collated.

    Args:
        dataset: The split.
        collator: Makes a batch (a dictionary) from a list of examples.
        device: Where the batches go.
        resident: Splits up to this many bytes are held in memory as a whole.
        readings: Where their arrays may be at hand, and are kept.

    Attributes:
        device: Where the batches go.
        arrays: The whole split by column, where it is in memory and no transform changes its batches. Not to be
            written to: it may be Arrow's.

    Raises:
        ValueError: The default collator cannot tell which column holds the labels, or they are text.
    """

    def __init__(
        self,
        dataset: Dataset,
        collator: Collator,
        device: torch.device,
        resident: int = RESIDENT_BYTES,
        readings: Readings | None = None,
    ) -> None:
        self._dataset = dataset
        self._collator = collator
        self.device = device
        self._arrays: dict[str, np.ndarray] | None = None
        self._columns: dict[str, Tensor] | None = None
        form = dataset.format
        transform = form["format_kwargs"].get("transform")
        self._transform = transform if isinstance(transform, BatchTransform) else None
        if collator is default_data_collator and (form["type"] in (None, "torch") or self._transform is not None):
            self._collator = _stack
            self._arrays = None if readings is None else readings.get(dataset, resident)
            if self._arrays is None:
                _check_labels(dataset)
                size = _size(dataset)
                self._arrays = _as_arrays(dataset) if len(dataset) and size <= resident else None
                if readings is not None and self._arrays is not None:
                    readings.keep(dataset, self._arrays, size)
            if self._arrays is None and self._transform is None:
                self._dataset = dataset.with_format("torch", columns=form["columns"])
        self.arrays = self._arrays if self._transform is None else None
        self._length = len(dataset)

    @property
    def resident(self) -> bool:
        """Whether the whole split is in memory."""
        return self._arrays is not None

    def __len__(self) -> int:
        return self._length

    def select(self, rows: Tensor) -> Examples:
        """Some of the examples.

        Args:
            rows: Row numbers, int64 on the CPU.
        """
        found = copy.copy(self)
        found._length = len(rows)
        if self._arrays is None:
            found._dataset = Viewed(self._dataset).view(rows.numpy())
            return found
        found._arrays = {name: values[rows.numpy()] for name, values in self._arrays.items()}
        found._columns = None
        found.arrays = found._arrays if self._transform is None else None
        return found

    def classes(self) -> np.ndarray | None:
        """The examples' labels, where a column of integers holds them, any shape; else None."""
        if self._arrays is not None:
            labels = self._arrays.get("labels")
            return labels if labels is not None and labels.dtype == np.int64 else None
        return labels_of(self._dataset)

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[int, Batch]]:
        """Batch after batch, each with its number of examples.

        Args:
            order: The rows of each batch.

        Raises: as `batch` does.
        """
        if self.arrays is None:
            for rows in order:
                yield len(rows), self.batch(rows)
            return
        order = iter(order)
        while ahead := list(islice(order, BATCHES_AHEAD)):  # fetched together and cut: fewer, longer copies
            sizes = [len(rows) for rows in ahead]
            cut = {name: column.split(sizes) for name, column in self.batch(torch.cat(ahead)).items()}
            for index, size in enumerate(sizes):
                yield size, {name: parts[index] for name, parts in cut.items()}

    def batch(self, rows: Tensor) -> Batch:
        """The examples of some rows as one batch on the device.

        Args:
            rows: Row numbers, int64 on the CPU.

        Raises:
            TypeError: The collator does not return a mapping.
            ValueError: The default collator cannot stack the examples.
        """
        if self._arrays is not None:
            if self.device.type == "cpu":
                chosen = rows.numpy()
                batch = {name: torch.from_numpy(values.take(chosen, axis=0)) for name, values in self._arrays.items()}
            else:
                self._columns = self._columns or as_columns([self._arrays], self.device)
                batch = select_rows(self._columns, rows.to(self.device))
            return batch if self._transform is None else self._transform.tensors(batch)
        batch = self._collator(self._dataset.__getitems__(rows.tolist()))
        if not hasattr(batch, "items"):
            raise TypeError(f"data_collator must return a dictionary of tensors, got {type(batch).__name__}.")
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _check_labels(dataset: Dataset) -> None:
    """Refuse labels of which the default collator would leave some out."""
    found = [name for name in dataset.format["columns"] if name in LABEL_COLUMNS]
    features = dataset.info.features or {}  # `dataset.features` is a deep copy, which takes longer than a small step
    text = [name for name in found if getattr(features[name], "dtype", None) in ("string", "large_string")]
    if len(found) - len(text) > 1:
        raise ValueError(f"the columns {found} all hold labels: keep one of them, or rename the others.")
    if text and text == found:
        raise ValueError(
            f'the column "{text[0]}" is text; labels are numbers. Encode it before the dataset is split over clients, '
            f'with dataset.class_encode_column("{text[0]}") or a ClassLabel feature.'
        )


def _stack(rows: list[Any]) -> Any:
    try:
        return default_data_collator(rows)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the columns {sorted(rows[0])} cannot be stacked into a batch ({error}): give the trainer a "
            "data_collator that pads or converts them."
        ) from error


def select_rows(columns: Mapping[str, Tensor], rows: Tensor) -> Batch:
    """The batch of these rows, whose numbers are on the columns' device."""
    return {name: column.index_select(0, rows) for name, column in columns.items()}


def as_columns(splits: Sequence[Mapping[str, np.ndarray]], device: torch.device) -> dict[str, Tensor]:
    """Splits with the same columns, one after the other, as tensors on the device."""
    joined = {name: np.concatenate([arrays[name] for arrays in splits]) for name in splits[0]}  # copies in any case
    return {name: torch.from_numpy(values).to(device) for name, values in joined.items()}


def _size(dataset: Dataset) -> int:
    """Bytes of the columns that are asked for, by the first row; 0 without rows."""
    return _rows(dataset, 1).select(dataset.format["columns"]).nbytes * len(dataset) if len(dataset) else 0


def _as_arrays(dataset: Dataset) -> dict[str, np.ndarray] | None:
    """All columns as `default_data_collator` would make them of all rows: text is left out, labels are renamed.

    Returns:
        Name → array, or None where a column is more than numbers of one shape.
    """
    # Read directly: `with_format` takes longer than a small split's examples do.
    table = _rows(dataset, len(dataset)).select(dataset.format["columns"])
    columns: dict[str, np.ndarray] = {}
    for name in table.column_names:
        if pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type):
            continue
        column = table[name]
        values = _as_array(column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())  # the latter copies
        if values is None:
            return None
        columns["labels" if name in ("label", "label_ids") else name] = values
    return columns


def _rows(dataset: Dataset, count: int) -> pa.Table:
    """The first rows of a dataset."""
    return query_table(dataset.data, slice(0, count), indices=dataset._indices)


def _as_array(column: pa.Array) -> np.ndarray | None:
    """A column of numbers, or of lists of lists of them, as float32, int64 or bool; None for anything else.

    This is several times faster than the formatters of `datasets`, which go through a Python object per row.
    """
    if isinstance(column, pa.ChunkedArray):  # what combine_chunks leaves of several extension arrays
        return None
    shape = [len(column)]
    while True:
        if column.null_count:
            return None
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        elif any(is_kind(column.type) for is_kind in _LISTS):
            lengths = pc.min_max(pc.list_value_length(column)).as_py()
            if lengths["min"] != lengths["max"]:
                return None
            shape.append(lengths["min"])
            column = column.flatten()
        else:
            break
    for is_kind, dtype in (
        (pa.types.is_floating, np.float32),
        (pa.types.is_integer, np.int64),
        (pa.types.is_boolean, np.bool_),
    ):
        if is_kind(column.type):
            return column.to_numpy(zero_copy_only=False).astype(dtype, copy=False).reshape(shape)
    return None


def shuffled_batches(num_examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch: the rows of each batch, in the generator's order. The last batch may be smaller."""
    yield from torch.randperm(num_examples, generator=generator).split(batch_size)


def ordered_batches(num_examples: int, batch_size: int) -> Iterator[Tensor]:
    """The rows of each batch, in the dataset's order."""
    yield from torch.arange(num_examples).split(batch_size)
