"""How often each label occurs among a client's examples, which is no trait of its cluster's adaptor."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from datasets.formatting import query_table
from torch import Tensor

from floral_peft.federated.dataset import LABEL_COLUMNS


#: What is added to each label's count, as if so much of an example of it had been seen.
PSEUDO_COUNT = 0.3


def label_log_prior(labels: np.ndarray, classes: int) -> Tensor:
    """Log q, q(y) = (count(y) + ε) / (n + ε·classes): shape (classes,), float32.

    Labels that no class has, negative or too large, are not counted: losses may leave them out.

    Args:
        labels: A client's labels, integers, any shape.
        classes: How many labels there are.
    """
    counted = labels[(labels >= 0) & (labels < classes)].ravel().astype(np.int64)
    counts = np.bincount(counted, minlength=classes).astype(np.float32) + PSEUDO_COUNT
    return torch.from_numpy(np.log(counts / counts.sum()))


def labels_of(dataset: Dataset) -> np.ndarray | None:
    """The labels of a client's examples; None where no column of numbers holds them."""
    names = [name for name in dataset.format["columns"] if name in LABEL_COLUMNS]
    if len(names) != 1 or len(dataset) == 0:
        return None
    column = query_table(dataset.data, slice(0, len(dataset)), indices=dataset._indices)[names[0]]
    values: np.ndarray = column.to_numpy()
    return values if values.dtype.kind in "iu" else None
