"""Private tensors of clients that were away while adaptors were removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from floral_peft.federated.server import PrivateState


#: Beside a client's private tensors: which adaptors, by their first numbers, they are over. Without it: all.
ADAPTORS = "floral_adaptors"


def numbered(private: PrivateState, alive: Sequence[int], count: int) -> PrivateState:
    """A client's private tensors as they are stored: with the adaptors that they are over, if not all.

    Args:
        private: The tensors.
        alive: The first numbers of the adaptors that there are.
        count: How many there were at first.
    """
    return private if len(alive) == count or not private else {**private, ADAPTORS: torch.tensor(alive)}


def renumbered(stored: PrivateState, alive: Sequence[int], like: Mapping[str, Tensor]) -> PrivateState:
    """A client's stored private tensors over the adaptors that there are now. Adaptors are only ever removed.

    Args:
        stored: What `numbered` gave, at any time.
        alive: The first numbers of the adaptors that there are now.
        like: The tensors of any client, of the shapes that they have now.

    Returns:
        The tensors, without those adaptors' part that are gone; which axis counts adaptors is where lengths differ.
    """
    before = stored.get(ADAPTORS)
    held = {name: value for name, value in stored.items() if name != ADAPTORS}
    place = {number: column for column, number in enumerate(before.tolist())} if before is not None else None
    columns = torch.tensor([number if place is None else place[number] for number in alive])
    return {name: _selected(value, columns, like[name].shape) for name, value in held.items()}


def _selected(value: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    axis = next((axis for axis, size in enumerate(shape) if value.shape[axis] != size), None)
    return value if axis is None else value.index_select(axis, columns)
