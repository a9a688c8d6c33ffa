"""What clients' examples say of the adaptors: mean losses of pure models, in as few passes as they fit into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    models: PureModels, forward: Forward, clients: Sequence[Sequence[Piece]], batch_size: int
) -> list[list[Tensor]]:
    """The mean loss of each part of each client's examples under each adaptor alone.

    Pieces share passes, those of several clients too. The model must be the same for all of these clients, but for
    their routers.

    Args:
        models: The model under each of its adaptors alone.
        forward: Calls it on a batch.
        clients: Each client's pieces: those of its first part, of its second, and so on.
        batch_size: Most examples in a pass.

    Returns:
        For each client and part f, float32 on the CPU, (C,).
    """
    passes = list(_passes(((k, piece) for k, pieces in enumerate(clients) for piece in pieces), batch_size))
    losses = models.losses(forward.losses_of_parts, [[piece.batch for _, piece in one] for one in passes])
    found: list[list[Tensor]] = [[] for _ in clients]
    for one, values in zip(passes, losses, strict=True):
        for (k, piece), value in zip(one, values.float().cpu().unbind(dim=1), strict=True):
            if piece.part == len(found[k]):
                found[k].append(torch.zeros_like(value))
            found[k][piece.part] += value * piece.share
    return found


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
