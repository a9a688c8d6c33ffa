"""What clients' examples say of the adaptors: mean losses of pure models, in as few passes as they fit into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from floral_peft.federated.batches import Batch
from floral_peft.federated.forward import Forward
from floral_peft.tuner import PureModels


class Piece(NamedTuple):
    """Examples that go through the model together.

    Args:
        part: The part of a client's examples to which they belong.
        share: Their share in its mean.
        size: How many they are.
        batch: The examples.
    """

    part: int
    share: float
    size: int
    batch: Batch


def mean_losses(
    models: PureModels, forward: Forward, groups: Sequence[Sequence[Sequence[Piece]]], batch_size: int
) -> list[list[Tensor]]:
    """The mean loss of each part of each client's examples under each adaptor alone.

    Pieces share passes, those of the clients of a group too; all clients share what is prepared once for each adaptor,
    such as merged weights. What a client is told has the same bits whatever other groups there are. The model must be
    the same for all of these clients, but for their routers.

    Args:
        models: The model under each of its adaptors alone.
        forward: Calls it on a batch.
        groups: The pieces of each client of each group: those of its first part, of its second, and so on.
        batch_size: Most examples in a pass.

    Returns:
        For each client and part f, float32 on the CPU, (C,): the clients of all groups in order.
    """
    number = count()
    numbered = [[(k, piece) for pieces, k in zip(group, number, strict=False) for piece in pieces] for group in groups]
    passes = [one for pieces in numbered for one in _passes(pieces, batch_size)]
    losses = models.losses(forward.losses_of_parts, [[piece.batch for _, piece in one] for one in passes])
    told: list[list[list[tuple[float, Tensor]]]] = [[] for group in groups for _ in group]  # client, part, piece
    for one, values in zip(passes, losses, strict=True):
        for (k, piece), value in zip(one, values.float().cpu().unbind(dim=1), strict=True):
            if piece.part == len(told[k]):
                told[k].append([])
            told[k][piece.part].append((piece.share, value))
    return [[_mean(pieces) for pieces in parts] for parts in told]


def _mean(pieces: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The weighted mean of pieces' losses, (C,). Those of no number, for want of labels, count if all are."""
    if len(pieces) == 1:
        return pieces[0][1]
    known = [(share, value) for share, value in pieces if not bool(value.isnan().all())]
    if len(known) in (0, len(pieces)):
        return torch.stack([share * value for share, value in pieces]).sum(dim=0)
    whole = sum(share for share, _ in known)
    return torch.stack([share / whole * value for share, value in known]).sum(dim=0)


def _passes(pieces: Iterable[tuple[int, Piece]], batch_size: int) -> Iterator[list[tuple[int, Piece]]]:
    """Pieces in groups of up to so many examples, in order."""
    group: list[tuple[int, Piece]] = []
    size = 0
    for client, piece in pieces:
        if group and size + piece.size > batch_size:
            yield group
            group, size = [], 0
        group.append((client, piece))
        size += piece.size
    if group:
        yield group
