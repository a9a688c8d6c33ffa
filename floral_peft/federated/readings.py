"""Splits that have been read of late."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from datasets import Dataset


#: What is held at most.
READ_BYTES = 256 * 2**20

#: The table of a dataset, its row numbers and the columns that are asked for, by identity.
Key = tuple[int, int, tuple[str, ...]]
Arrays = dict[str, np.ndarray]


class _Reading(NamedTuple):
    arrays: Arrays
    nbytes: int
    size: int
    alive: tuple[weakref.ref[object], ...]


class Readings:
    """The arrays of splits for as long as these are there, the latest ones up to so many bytes.

    A client that comes again need not be read again: for a small split that takes longer than a step of a small model.
    A split is known by the table and the row numbers of its dataset, objects that are never changed.

    Args:
        limit: How many bytes are held at most.
    """

    def __init__(self, limit: int = READ_BYTES) -> None:
        self._limit = limit
        self._held: OrderedDict[Key, _Reading] = OrderedDict()
        self._nbytes = 0

    def get(self, dataset: Dataset, resident: int) -> Arrays | None:
        """What was kept for a split, if its size is no more than so many bytes; else None."""
        key = _key(dataset)
        found = self._held.get(key)
        if found is None or found.size > resident:
            return None
        self._held.move_to_end(key)
        return found.arrays

    def keep(self, dataset: Dataset, arrays: Arrays, size: int) -> None:
        """Keep a split's arrays, which nobody may write to, unless they alone are more than may be held.

        Args:
            dataset: The split.
            arrays: What was read of it.
            size: Its bytes as the dataset has them, by which it is decided whether a split may be held in memory.
        """
        key, nbytes = _key(dataset), sum(values.nbytes for values in arrays.values())
        self._drop(key)
        if nbytes > self._limit:
            return
        parts = [part for part in (dataset._data, dataset._indices) if part is not None]
        alive = tuple(weakref.ref(part, lambda _: self._drop(key)) for part in parts)
        self._held[key] = _Reading(arrays, nbytes, size, alive)
        self._nbytes += nbytes
        while self._nbytes > self._limit:
            self._drop(next(iter(self._held)))

    def _drop(self, key: Key) -> None:
        found = self._held.pop(key, None)
        if found is not None:
            self._nbytes -= found.nbytes


def _key(dataset: Dataset) -> Key:
    return id(dataset._data), id(dataset._indices), tuple(dataset.format["columns"])
