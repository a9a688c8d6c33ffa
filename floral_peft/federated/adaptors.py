"""Which adaptors a model has in the course of a run: more at first, fewer later, and a resumed run must follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from floral_peft.federated.groups import ParameterGroups, tensors_of
from floral_peft.federated.processes import Processes
from floral_peft.federated.routers import Routers
from floral_peft.federated.routing import Drop, RouterUpdate, told
from floral_peft.federated.routing.numbering import numbered, renumbered
from floral_peft.federated.server import PrivateState, ServerState
from floral_peft.federated.server_adaptors import after_compression, without_adaptors
from floral_peft.federated.visitor import Visitor
from floral_peft.tuner import FloralModel, Ranks


class Adaptors:
    """The adaptors of a model, by the numbers that they had when the run began.

    A run begins with a search, if the routers' update asks for one: each adaptor is there in several copies, of a
    larger rank, and they come to differ by the clients that train them. When the search ends, no more of them stay
    than the model had, and they have its ranks again. Adaptors that nobody needs may go at any time.

    Args:
        model: The model.
        routers: Its routers, if it has any.
        visitor: Sets its tensors.
        groups: Which of them are shared, clustered, private.
        update: How clients find their routers: it says which adaptors go, and when.
        processes: Those that share the run.
        num_clients: K.
        seed: Of what is drawn for adaptors.

    Attributes:
        alive: The first numbers of those that there are.
        wide: Whether the search goes on.
        untrained: The private tensors of a client that has not trained, but for its own router.
    """

    def __init__(
        self,
        model: Any,
        routers: Routers | None,
        visitor: Visitor,
        groups: ParameterGroups,
        update: RouterUpdate,
        processes: Processes,
        num_clients: int,
        seed: int,
    ) -> None:
        self._model = model
        self._routers = routers
        self._visitor = visitor
        self._groups = groups
        self._update = update
        self._processes = processes
        self._num_clients = num_clients
        self._seed = seed
        self._ranks: Ranks | None = None  # those to come back to
        self.untrained: PrivateState = {}
        self._restart()

    def begin(self) -> None:
        """A run begins with the adaptors that the model has, and those beside them that search."""
        self._restart()
        self.fit(range(self._count), wide=self._count > self._most or self._too_narrow())

    def _too_narrow(self) -> bool:
        """Whether the search is for adaptors of a larger rank than they have."""
        wanted = self._update.search_rank()
        return self._most > 1 and wanted is not None and bool(_floral(self._model).widens(wanted))

    def _restart(self) -> None:
        self.wide = False
        self._most = self._count = 0
        self._top_k: int | None = None
        if self._routers is not None:
            self._most = self._count = self._routers.shape[-1]
            if self._most > 1:
                self._count = self._update.search_adaptors(self._most, self._num_clients)
            self._routers.restart(self._count)
            self._top_k = self._model.active_peft_config.router_top_k
        self.alive = tuple(range(self._most))
        self._refresh()

    def fit(self, alive: Sequence[int], wide: bool) -> None:
        """Make the model one of these adaptors; between visits, when it holds no client's tensors.

        Where it had others meanwhile, their values are still to be loaded.

        Args:
            alive: Their first numbers.
            wide: Whether they have the ranks of the search.
        """
        if self._routers is None or (tuple(alive), wide) == (self.alive, self.wide):
            return
        inside = _floral(self._model)
        if not set(alive) <= set(self.alive):
            inside.make_room(self._count, self._top_k)
            self.alive = tuple(range(self._count))
        rank = self._update.search_rank()
        if wide and rank is not None and self._ranks is None:
            self._ranks = inside.widen(rank, self._seed)
        elif not wide:
            self._compress()
        kept = [self.alive.index(number) for number in alive]
        if len(kept) < len(self.alive):
            inside.keep_adaptors(kept)
        self.alive, self.wide = tuple(alive), wide
        self._routers.show(self.alive)
        self._refresh()

    def after_round(self, server: ServerState) -> tuple[ServerState, dict[str, Any]]:
        """Remove the adaptors that are to go after a round, and end the search when it is time.

        Args:
            server: The server's state, which the model holds.

        Returns:
            The state, which the model then holds; and what a round's report says of it, nothing if nothing happened.
        """
        found: dict[str, Any] = {}
        if drops := self._update.pools(server.routing, server.round):
            return self._pooled(server, drops)
        if drops := self._update.prune(server.routing, server.round):
            found["pruned"] = told(drops, server.adaptors)
            server = self._without(server, [drop.adaptor for drop in drops])
        if self._update.searched(server.routing, server.round, self._most):
            server, more = self.end_search(server)
            found = {**more, "pruned": found.get("pruned", []) + more["pruned"]}
        return server, found

    def end_search(self, server: ServerState) -> tuple[ServerState, dict[str, Any]]:
        """No more adaptors stay than may, and they have, compressed, the ranks that they are to have.

        Args:
            server: As of `after_round`, and so is what is returned.
        """
        drops = self._update.cut(server.routing, self._most)
        pruned = told(drops, server.adaptors)
        if drops:
            server = self._without(server, [drop.adaptor for drop in drops])
        server, lost = self._compressed(server)
        return server, {"pruned": pruned, "lost": lost}

    def _without(self, server: ServerState, dropped: Sequence[int]) -> ServerState:
        """The server's state without some adaptors, which then are gone from the model, too."""
        kept = [number for number in range(len(server.adaptors)) if number not in dropped]
        axes = {name: cluster.axis for name, cluster in self._groups.clustered.items()}
        server = without_adaptors(server, kept, axes)
        self.fit(server.adaptors, server.wide)
        self._visitor.load(self.untrained, server)
        return replace(server, routing=self._update.keep(server.routing, kept))

    def _pooled(self, server: ServerState, drops: Sequence[Drop]) -> tuple[ServerState, dict[str, Any]]:
        """The server's state with one adaptor, the mean of all, which the model then has: the search is over."""
        pruned = told(drops, server.adaptors)
        ranks, self._ranks = self._ranks, None
        lost = _floral(self._model).pool(server.routing["usage"], ranks)
        axes = {name: cluster.axis for name, cluster in self._groups.clustered.items()}
        server = without_adaptors(server, [0], axes)
        server = replace(server, optimizer={k: v for k, v in server.optimizer.items() if k not in axes})
        self.alive, self.wide = server.adaptors, False
        if self._routers is not None:
            self._routers.show(self.alive)
        server = self._settled(replace(server, routing=self._update.keep(server.routing, [0])))
        return server, {"pruned": pruned, "lost": lost}

    def _compressed(self, server: ServerState) -> tuple[ServerState, dict[str, float]]:
        """The server's state, which the model holds, with adaptors of the ranks that may stay; what is lost."""
        lost = self._compress(server.routing.get("usage"))
        self.wide = False
        return self._settled(server), lost

    def _settled(self, server: ServerState) -> ServerState:
        """The server's state once the model's adaptors are those that stay after the search, in every process."""
        self._processes.copy_from_main(tensors_of(self._model).values())
        server = after_compression(server, self._model)
        self._refresh()
        self._visitor.load(self.untrained, server)
        return replace(server, routing=self._update.settled(server.routing, server.round))

    def _compress(self, weights: torch.Tensor | None = None) -> dict[str, float]:
        """Bring wide adaptors back to their rank. Layer → what is lost.

        Args:
            weights: How much each adaptor counts, (C,); all the same by default.
        """
        ranks, self._ranks = self._ranks, None
        return {} if ranks is None else _floral(self._model).narrow(ranks, weights)

    def stored(self, private: PrivateState) -> PrivateState:
        """A client's private tensors as they are stored: see `numbered`."""
        return numbered(private, self.alive, self._count)

    def held(self, stored: PrivateState) -> PrivateState:
        """A client's stored private tensors over the adaptors that there are now: see `renumbered`."""
        return renumbered(stored, self.alive, self.untrained)

    def _refresh(self) -> None:
        """Private tensors have the shapes that the model's have now."""
        self.untrained = self._visitor.private()
        if self._routers is not None:
            self.untrained[self._routers.name] = torch.zeros(1, *self._routers.shape)


def _floral(model: Any) -> Any:
    """The tuner in a PEFT model."""
    found = next((module for module in model.modules() if isinstance(module, FloralModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no FLORAL adaptors of which some could be removed.")
    return found
