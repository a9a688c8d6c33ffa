"""The low-rank factors of a model's FLORAL layers, and factors as matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from floral_peft.tuner.layers import FloralLayer


Pair = tuple[Tensor, Tensor]
"""A layer's low-rank factors: A (C, r, in...) and B (out, C, r, kernel...)."""


def factor_pairs(model: nn.Module) -> list[Pair]:
    """The low-rank factors of all FLORAL layers in a model, its active adapters'."""
    return [pair for layer in model.modules() if isinstance(layer, FloralLayer) for pair in layer.factor_pairs()]


def stack_matrices(tensors: list[Tensor]) -> Tensor:
    """Factors (C, r, ...) as matrices (layers, C, r, n), in float32 at least."""
    rows = [tensor.flatten(2).to(at_least_float32(tensor.dtype)) for tensor in tensors]
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """A precision in which Gram matrices of factors can be computed."""
    return torch.promote_types(dtype, torch.float32)
