"""Arrays as datasets, cut into clients' splits without a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from floral_peft.federated.views import Viewed


def as_dataset(columns: Mapping[str, np.ndarray]) -> Dataset:
    """A dataset over arrays, which it shares; rows come out as PyTorch's tensors.

    Args:
        columns: Name → array (rows, ...).
    """
    table = pa.table({name: _as_arrow(np.ascontiguousarray(array)) for name, array in columns.items()})
    # By default it would be a hash of all the bytes, which takes longer than all the rest.
    return Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint()).with_format("torch")


def cut(dataset: Dataset, sizes: Sequence[int]) -> list[Dataset]:
    """Consecutive runs of a dataset's rows, as views."""
    whole = Viewed(dataset)
    return [whole.view(np.arange(start, end)) for start, end in pairwise(accumulate(sizes, initial=0))]


def _as_arrow(array: np.ndarray) -> pa.Array:
    """Rows of an array of more than one dimension are lists of lists."""
    found = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        found = pa.FixedSizeListArray.from_arrays(found, size)
    return found
