"""Adaptors that all start equal, told apart without moving the model."""

from __future__ import annotations

import torch
from torch import nn

from floral_peft.tuner.precondition import factor_pairs


@torch.no_grad()
def separate_adaptors(model: nn.Module, std: float, generator: torch.Generator) -> bool:
    """Give adaptors that all start as the identity random factors in pairs of opposite sign.

    Adaptor c and adaptor c + ⌊C/2⌋ get one A, and B and −B with B normal: their products cancel, so that under the
    uniform mixture the model stays what it was, while the pure models differ. Of an odd number the last stays the
    identity. Biases and norms' scales stay as they are.

    Args:
        model: A model with FLORAL layers. Its active adapter is changed in place, unless any of its second factors is
            not zero: then it has its start already.
        std: Standard deviation of B's elements.
        generator: Of the random numbers, on the CPU.

    Returns:
        Whether the model was changed.
    """
    pairs = factor_pairs(model)
    if not pairs or any(bool(b.any()) for _, b in pairs):
        return False
    for a, b in pairs:
        half = len(a) // 2
        drawn = torch.randn((b.shape[0], half, *b.shape[2:]), generator=generator) * std
        a[half : 2 * half] = a[:half]
        b[:, :half] = drawn.to(b)
        b[:, half : 2 * half] = -b[:, :half]
    return True
