"""Which adaptors a model has in the course of a run: the server removes some of them, and a resumed run must, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from floral_peft.federated.groups import tensors_of
from floral_peft.federated.routers import Routers
from floral_peft.federated.routing.numbering import numbered, renumbered
from floral_peft.federated.server import PrivateState, ServerState
from floral_peft.tuner import FloralModel, Ranks


class Adaptors:
    """The adaptors of a model, by the numbers that they had when the run began.

    Args:
        model: The model.
        routers: Its routers, if it has any.
        search_rank: The least rank of adaptors that are wide.
        seed: Of what is drawn for them.
    """

    def __init__(self, model: Any, routers: Routers | None, search_rank: int | None, seed: int) -> None:
        self._model = model
        self._routers = routers
        self._search_rank = search_rank
        self._seed = seed
        self._ranks: Ranks | None = None  # those to come back to, of wide adaptors
        self.restart()

    @property
    def wide(self) -> bool:
        """Whether they have the rank of the search."""
        return self._ranks is not None

    def restart(self) -> None:
        """A run begins with the adaptors that the model has."""
        self.count = 0
        self._top_k: int | None = None
        if self._routers is not None:
            self._routers.restart()
            self.count = self._routers.shape[-1]
            self._top_k = self._model.active_peft_config.router_top_k
        self.alive = tuple(range(self.count))

    def fit(self, alive: Sequence[int], wide: bool) -> bool:
        """Make the model one of these adaptors. Where it had others meanwhile, their values are still to be loaded.

        Args:
            alive: Their first numbers.
            wide: Whether they have the rank of the search.

        Returns:
            Whether anything has changed: the model has new parameters then.
        """
        if self._routers is None or (tuple(alive), wide) == (self.alive, self.wide):
            return False
        inside = _floral(self._model)
        if wide and self._search_rank is not None and self._ranks is None:
            self._ranks = inside.widen(self._search_rank, self._seed)
        elif not wide:
            self.compress()
        if not set(alive) <= set(self.alive):
            inside.make_room(self.count, self._top_k)
            self._routers.show(range(self.count))
            self.alive = tuple(range(self.count))
        kept = [self.alive.index(number) for number in alive]
        if len(kept) < len(self.alive):
            inside.keep_adaptors(kept)
        self.alive = tuple(alive)
        self._routers.show(self.alive)
        return True

    def compress(self, weights: torch.Tensor | None = None) -> dict[str, float]:
        """Bring wide adaptors back to their rank. Layer → what is lost.

        Args:
            weights: How much each adaptor counts, (C,); all the same by default.
        """
        ranks, self._ranks = self._ranks, None
        return {} if ranks is None else _floral(self._model).narrow(ranks, weights)

    def stored(self, private: PrivateState) -> PrivateState:
        """A client's private tensors as they are stored: see `numbered`."""
        return numbered(private, self.alive, self.count)

    def held(self, stored: PrivateState, like: PrivateState) -> PrivateState:
        """A client's stored private tensors over the adaptors that there are now: see `renumbered`."""
        return renumbered(stored, self.alive, like)


def _floral(model: Any) -> Any:
    """The tuner in a PEFT model."""
    found = next((module for module in model.modules() if isinstance(module, FloralModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no FLORAL adaptors of which some could be removed.")
    return found


def without_adaptors(server: ServerState, kept: Sequence[int], axes: dict[str, int]) -> ServerState:
    """The server's state with some adaptors only.

    Args:
        server: The state.
        kept: Their present numbers.
        axes: The axis of length C of each clustered tensor.
    """

    def select(name: str, value: Any) -> Any:
        # An optimiser's memories have their parameter's shape, or are counters.
        if name not in axes or not isinstance(value, torch.Tensor) or value.shape != server.tensors[name].shape:
            return value
        return value.index_select(axes[name], torch.tensor(kept, device=value.device))

    return ServerState(
        round=server.round,
        tensors={name: select(name, value) for name, value in server.tensors.items()},
        optimizer={
            name: {key: select(name, value) for key, value in memory.items()}
            for name, memory in server.optimizer.items()
        },
        routing=server.routing,
        adaptors=tuple(server.adaptors[number] for number in kept),
        wide=server.wide,
    )


def after_compression(server: ServerState, model: torch.nn.Module) -> ServerState:
    """The server's state once the model that holds it has been compressed.

    What has not changed keeps the server's precision; optimisers' memories of what has another shape are gone.

    Args:
        server: The state before.
        model: The model.
    """
    held = tensors_of(model)
    tensors = {}
    for name, old in server.tensors.items():
        new = held[name]
        same = new.shape == old.shape and torch.equal(new, old.to(new.dtype))
        tensors[name] = old if same else new.to(old.dtype, copy=True)
    shaped = {name for name, old in server.tensors.items() if tensors[name].shape == old.shape}
    memory = {name: entries for name, entries in server.optimizer.items() if name in shaped}
    return replace(server, tensors=tensors, optimizer=memory, wide=False)
