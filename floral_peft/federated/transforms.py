"""Transforms of whole batches of tensors, such as random flips and crops of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class BatchTransform(ABC):
    """A transform for `Dataset.with_transform` that works on tensors.

    To any other transform `datasets` hands rows as lists of Python's numbers, which for images takes longer than a
    small model's step. Of a split with such a one, a trainer holds the columns in memory and transforms each batch on
    the device. What it draws it should draw from PyTorch's global generators, which are the client's own while it
    trains.
    """

    @abstractmethod
    def tensors(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the model is to see it.

        Args:
            batch: Column → tensor (examples, ...), not to be written to.
        """

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """What `datasets` calls, outside a trainer."""
        return self.tensors({name: torch.as_tensor(values) for name, values in rows.items()})
