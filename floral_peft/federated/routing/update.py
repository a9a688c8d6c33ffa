"""A way in which clients find their routers, known by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.routing.prune import Drop
from floral_peft.federated.turn import Arrival, Turn
from floral_peft.nearest import did_you_mean
from floral_peft.tuner.router import RouterSettings


class RouterUpdate:
    """Base class of the ways in which clients find their routers. As it stands, local steps train them.

    A subclass changes what it needs: settings of the run that the user has left open (`settle`), how mixtures are
    computed while clients train (`settings`), what a client does with its examples before its local steps (`arrival`),
    what the server remembers from round to round (`start`, `absorb`) of what clients tell it (`sums`), which adaptors
    it then removes (`prune`, `keep`) or makes one (`pools`), and how widely it searches at first (`search_adaptors`,
    `search_rank`, `searched`, `cut`). The server learns of routers weighted sums over the cohort only, which secure
    aggregation could carry; a client's logits never leave it.

    Args:
        args: The run's settings.
        sampled: The share of the clients that take part in a round.
    """

    name: ClassVar[str] = "none"

    def __init__(self, args: FederatedArguments, sampled: float = 1.0) -> None:
        self.args = args
        self.sampled = sampled

    def settle(self, args: FederatedArguments, memory: Mapping[str, Tensor], round: int) -> FederatedArguments:
        """A round's settings: the run's, with values for those that are None because they depend on the routers.

        Args:
            args: The run's settings.
            memory: What the server remembers of the routers; nothing before the run begins.
            round: The rounds done.
        """
        return replace(args, label_prior=bool(args.label_prior))

    def settings(self, settings: RouterSettings) -> RouterSettings:
        """How the model's router computes mixtures while it visits clients.

        Args:
            settings: As its config says.
        """
        return settings

    def arrival(self) -> Arrival | None:
        """What a client does before its local steps, and before it is evaluated: see [`Method.arrival`]."""
        return None

    def examined(self, turn: Turn) -> Sequence[Tensor]:
        """The parts of its examples, as rows, whose pure losses a client asks for on arrival; none: it asks nothing.

        Clients that arrive together then look at them together. Those that are not told here it looks at by itself.
        """
        return []

    def sums(self, num_adaptors: int) -> Mapping[str, torch.Size]:
        """What clients tell the server for its sum over the cohort: name → shape."""
        return {}

    def start(self, num_adaptors: int) -> dict[str, Tensor]:
        """What the server remembers before the first round: name → float64 on the CPU. Clients are told all of it."""
        return {}

    def absorb(self, memory: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the server remembers after a round.

        Args:
            memory: What it remembered before.
            sums: The cohort's sums.
        """
        return dict(memory)

    def prune(self, memory: Mapping[str, Tensor], round: int) -> list[Drop]:
        """Which adaptors are removed after a round, by their present numbers.

        Args:
            memory: What the server remembers.
            round: The round, from 1.
        """
        return []

    def search_adaptors(self, num_adaptors: int, num_clients: int) -> int:
        """How many adaptors there are while clients look for theirs.

        Args:
            num_adaptors: How many there may be afterwards.
            num_clients: K.
        """
        return num_adaptors

    def search_rank(self) -> int | None:
        """The least rank that they have meanwhile; None: what they have."""
        return None

    def searched(self, memory: Mapping[str, Tensor], round: int, most: int) -> bool:
        """Whether the search ends after a round: clients know their adaptors by now. It ends once.

        Args:
            memory: What the server remembers.
            round: The round, from 1.
            most: How many adaptors may stay.
        """
        return False

    def cut(self, memory: Mapping[str, Tensor], most: int) -> list[Drop]:
        """Which adaptors go at the end of the search, by their present numbers.

        Args:
            memory: What the server remembers.
            most: How many may stay.
        """
        return []

    def pools(self, memory: Mapping[str, Tensor], round: int) -> list[Drop]:
        """Which adaptors are made one with the first, the mean of all, after a round: all others, or none.

        Args:
            memory: What the server remembers.
            round: The round, from 1.
        """
        return []

    def settled(self, memory: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
        """What the server remembers once the search has ended after a round."""
        return dict(memory)

    def regrets(self, memory: Mapping[str, Tensor]) -> Tensor | None:
        """What an adaptor's users would lose with another one, (C, C), for the records; None where it is unknown."""
        return None

    def keep(self, memory: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
        """What the server remembers, without the adaptors that are gone.

        Args:
            memory: What it remembered before.
            kept: The present numbers of those that stay.
        """
        return dict(memory)


_UPDATES: dict[str, type[RouterUpdate]] = {}


def register_router_update(kind: type[RouterUpdate]) -> type[RouterUpdate]:
    """Class decorator: make a way to find routers available as `router_update`, under its `name`.

    Raises:
        ValueError: Another class has the name.
    """
    if _UPDATES.setdefault(kind.name, kind) is not kind:
        raise ValueError(f'"{kind.name}" is registered already: {_UPDATES[kind.name].__qualname__}.')
    return kind


def get_router_update(args: FederatedArguments, sampled: float = 1.0) -> RouterUpdate:
    """The way that the settings name.

    Args:
        args: The run's settings.
        sampled: The share of the clients that take part in a round.

    Raises:
        ValueError: None has the name.
    """
    name = args.router_update
    if name not in _UPDATES:
        known = sorted(_UPDATES)
        raise ValueError(f"router_update={name!r} must be one of {', '.join(known)}{did_you_mean(name, known)}")
    return _UPDATES[name](args, sampled)
