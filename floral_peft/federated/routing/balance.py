"""Keeping the adaptors' users even while routers are not to be trusted yet."""

from __future__ import annotations

import torch
from torch import Tensor


def balance(usage: Tensor, strength: float) -> Tensor:
    """A handicap for each adaptor, to be taken from the clients' logits: strength · log(C (U_c + 1) / Σ_j (U_j + 1)).

    It is above 0 for an adaptor that has more than its share of users, below 0 for one that has fewer, and 0 for all
    where they are even.

    Args:
        usage: U, how many clients each adaptor stood for of late, (C,).
        strength: How much a share counts; 0: nothing.
    """
    shares = torch.log(len(usage) * (usage + 1) / (usage + 1).sum())
    return strength * shares
