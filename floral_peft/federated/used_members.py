"""The member of an `Ensemble` that a client uses alone: it trains beside other clients as if there were no more."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from floral_peft.federated.forward import Forward
from floral_peft.federated.workplace import Workplace
from floral_peft.tuner import Ensemble


class Members:
    """The members of an ensemble, for clients of which each may train with the one that it uses.

    That is where local steps leave the router alone: a member whose weight is 0 keeps it and gets no gradient. All
    take part where something else may count: the router's noise, or a method's own forward. (In a loop the ensemble
    itself leaves them out; in a batched computation it cannot know the weights.)

    Args:
        place: The model and what belongs to it.
    """

    def __init__(self, place: Workplace) -> None:
        self._model: Any = place.model
        self._apply = isinstance(place.model, Ensemble) and type(place.forward) is Forward
        self._routers = {name for name, role in place.groups.roles.items() if role.kind == "router"}
        clustered = place.groups.clustered
        self._owners = {name: part.adaptor for name, part in clustered.items() if part.adaptor is not None}

    def among(self, trainable: Collection[str]) -> bool:
        """Whether they may be left out.

        Args:
            trainable: The parameters that local steps train.
        """
        if not self._apply or not self._routers.isdisjoint(trainable):
            return False
        router = self._model.router
        return not any(router.settings[name].noise for name in router.active_adapters)

    def grouped(self, mixtures: Tensor, trainable: Collection[str]) -> list[tuple[list[int], int | None]]:
        """Clients in groups by the member that they use alone.

        Args:
            mixtures: Each client's π, (clients, ..., C).
            trainable: The parameters that local steps train.

        Returns:
            The clients' numbers, ascending within a group, and the member; None for those that use several, or one
            that is not trained: a computation of its own would have nothing to train.
        """
        trained = {self._owners[name] for name in trainable if name in self._owners}
        used = mixtures.reshape(len(mixtures), -1, mixtures.shape[-1]).ne(0).any(dim=1)
        chosen = torch.where(used.sum(dim=1) == 1, used.to(torch.uint8).argmax(dim=1), -1).tolist()
        alone = [member if member in trained else -1 for member in chosen]
        groups = [(member, [k for k, own in enumerate(alone) if own == member]) for member in sorted(set(alone))]
        return [(clients, None if member < 0 else member) for member, clients in groups]

    def others(self, member: int | None) -> frozenset[str]:
        """The tensors of all members but one, of which those who use that one alone need nothing; none of them all."""
        return frozenset(name for name, owner in self._owners.items() if member is not None and owner != member)

    def alone(self, member: int | None) -> AbstractContextManager[None]:
        """Within, the ensemble runs that member alone; all for None."""
        found: AbstractContextManager[None] = nullcontext() if member is None else self._model.alone(member)
        return found
