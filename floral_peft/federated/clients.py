"""The clients as a trainer meets them: who comes to a round, with which private tensors, and to what turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from datasets import Dataset
from torch import Tensor

from floral_peft.federated.adaptors import Adaptors
from floral_peft.federated.aggregation import UpdateError
from floral_peft.federated.arrivals import GROUP, Arrivals
from floral_peft.federated.batches import RESIDENT_BYTES, Examples
from floral_peft.federated.cohort import CohortTraining
from floral_peft.federated.cohort_choice import build_training, choose_kind
from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.memory import keep_freed_memory
from floral_peft.federated.processes import Message, Processes, pack_states, unpack_states
from floral_peft.federated.rounds import Outcome
from floral_peft.federated.routers import Routers
from floral_peft.federated.seeding import ClientId, derive_seed
from floral_peft.federated.server import PrivateState, ServerState
from floral_peft.federated.stopwatch import Stopwatch
from floral_peft.federated.store import PrivateStore
from floral_peft.federated.turn import Arrived, Turn, with_arrival
from floral_peft.federated.visits import Private, Visits, in_groups
from floral_peft.federated.workplace import Workplace


logger = logging.getLogger(__name__)


class Clients:
    """The clients of one trainer.

    Args:
        dataset: Their examples.
        place: The model and what belongs to it.
        routers: The model's routers, if it has any.
        adaptors: What becomes of the model's adaptors over the rounds.
        arrivals: What clients find on arrival.
        store: What they keep.
        processes: Those that share them.
        cohort_size: How many of them come to a round.

    Attributes:
        place: The model and what belongs to it; the settings in it may be replaced.
    """

    def __init__(
        self,
        dataset: FederatedDataset,
        place: Workplace,
        routers: Routers | None,
        adaptors: Adaptors,
        arrivals: Arrivals,
        store: PrivateStore,
        processes: Processes,
        cohort_size: int,
    ) -> None:
        self._dataset = dataset
        self.place = place
        self._routers = routers
        self._adaptors = adaptors
        self.arrivals = arrivals
        self._store = store
        self._processes = processes
        self._visits = Visits(processes, dataset)
        self._cohort_size = cohort_size

    def cohort(self, round: int) -> list[ClientId]:
        """The clients of a round, drawn without replacement from the seed and the round."""
        ids = self._dataset.ids
        if self._cohort_size == len(ids):
            return list(ids)
        rng = np.random.default_rng(derive_seed(self.place.args.seed, "cohort", round))
        chosen = rng.choice(len(ids), self._cohort_size, replace=False, shuffle=False)
        return [ids[index] for index in np.sort(chosen)]

    def lots(self, cohort: Sequence[ClientId], round: int) -> dict[ClientId, int]:
        """A number for each client of a round: they go on from the round before, in an order that is drawn."""
        order = np.random.default_rng(derive_seed(self.place.args.seed, "lots", round)).permutation(len(cohort))
        first = (round - 1) * self._cohort_size
        return {client_id: first + int(n) for client_id, n in zip(cohort, order, strict=True)}

    def private(self, client_id: ClientId) -> PrivateState:
        """A client's private tensors: as it stored them, or those with which it starts."""
        stored = None if self.place.args.stateless else self._store.get(client_id)
        if stored is not None:
            return self._adaptors.held(stored)
        if self._routers is None:
            return self._adaptors.untrained
        return {**self._adaptors.untrained, self._routers.name: self._routers.initial(client_id)}

    def keep(self, client_id: ClientId, round: int, private: PrivateState) -> None:
        """Store what a client keeps after a round, unless clients keep nothing."""
        if not self.place.args.stateless:
            self._store.put(client_id, round, self._adaptors.stored(private))

    def training(self, server: ServerState, path: Path) -> CohortTraining:
        """The training that `args.cohort` asks for; the main process measures, where it is to be measured.

        Args:
            server: The server's state, with which the next round begins.
            path: Where the choice is kept.
        """

        def load(client_id: ClientId) -> tuple[Dataset, PrivateState]:
            return self._dataset[client_id]["train"], self.private(client_id)

        def choose() -> Message:
            return choose_kind(self.place, self.cohort(server.round + 1), load, server, path), {}

        if self.place.accelerator.device.type == "cpu":
            keep_freed_memory()
        return build_training(self._processes.on_main(choose)[0], self.place)

    def train(
        self, training: CohortTraining, cohort: Sequence[ClientId], state: ServerState, clock: Stopwatch
    ) -> Iterator[tuple[ClientId, Outcome]]:
        """Train those clients of a round that this process visits.

        Args:
            training: Trains clients that come together.
            cohort: The round's clients.
            state: The server's state.
            clock: Takes the time by phase.

        Yields:
            A client, and what came of its training.
        """
        split = None if self.place.args.local_steps else "train"
        lots = self.lots(cohort, state.round + 1)
        chunks = self._visits.together(training.chunks(cohort), self.private, split)
        for several in _up_to(GROUP, chunks) if self.arrivals.shared else ([chunk] for chunk in chunks):
            yield from self._train_together(training, several, lots, state, clock)

    def _train_together(
        self,
        training: CohortTraining,
        chunks: Sequence[Mapping[ClientId, Private]],
        lots: Mapping[ClientId, int],
        state: ServerState,
        clock: Stopwatch,
    ) -> Iterator[tuple[ClientId, Outcome]]:
        """Train chunks, one after the other, of clients that look at their examples together."""
        found: dict[ClientId, Arrived] = {}
        turns = self.turns(chunks, state.round, state, lots)
        if self.arrivals.shared:
            clock.lap("route")

        def load(client_id: ClientId) -> tuple[Dataset | Examples, PrivateState]:
            clock.lap("train")
            turn = turns(client_id)
            clock.lap("load")
            found[client_id] = self.arrivals(turn)
            if self.arrivals.arrival is not None:
                clock.lap("route")
            chosen = found[client_id].trains_on
            return turn.dataset if chosen is None else chosen, found[client_id].private

        for chunk in chunks:
            outcomes = training(list(chunk), load, state)
            for client_id in chunk:
                outcome = next(outcomes)
                clock.lap("train")
                yield client_id, with_arrival(outcome, found.pop(client_id, None))
                del outcome  # not while the next client trains

    def turn(
        self,
        client_id: ClientId,
        private: PrivateState,
        round: int,
        state: ServerState | None = None,
        resident: int = RESIDENT_BYTES,
        lot: int = 0,
    ) -> Turn:
        """A client at the model; without the server's state, the model holds it already."""
        dataset = self._dataset[client_id]["train"]
        return Turn(self.place, self._routers, client_id, dataset, private, round, state, resident, lot)

    def turns(
        self,
        groups: Sequence[Mapping[ClientId, Private]],
        round: int,
        state: ServerState | None = None,
        lots: Mapping[ClientId, int] = MappingProxyType({}),
    ) -> Callable[[ClientId], Turn]:
        """Gives the turns of clients that come together, each once; they know what could be found for all at once."""
        private = {client_id: own for group in groups for client_id, own in group.items()}
        together = {client_id: len(group) for group in groups for client_id in group}
        held: dict[ClientId, Turn] = {}

        def begin(client_id: ClientId) -> Turn:
            resident, lot = RESIDENT_BYTES // len(private), lots.get(client_id, 0)
            return self.turn(client_id, private[client_id](), round, state, resident, lot)

        def turn(client_id: ClientId) -> Turn:
            found = held.pop(client_id, None) or begin(client_id)
            found.hold(RESIDENT_BYTES // together[client_id])
            return found

        if self.arrivals.shared and len(private) > 1:
            for client_id in private:
                with suppress(Exception):  # told when the client comes
                    held[client_id] = begin(client_id)
            self.arrivals.foresee([[held[client_id] for client_id in group if client_id in held] for group in groups])
        return turn

    def everybody(self, split: str, round: int) -> Iterator[tuple[ClientId, Callable[[], Turn]]]:
        """The turns of all clients that this process visits outside training; a split says what a visit costs."""
        groups = in_groups(self._dataset, GROUP if self.arrivals.shared else 1)
        for private in self._visits.together(groups, self.private, split):
            turns = self.turns([private], round)
            yield from ((client_id, partial(turns, client_id)) for client_id in private)

    def trained_routers(self, name: str, round: int) -> dict[ClientId, Tensor]:
        """The routers, (1, L, C), that clients have kept; where they are found on arrival, those of all clients.

        A client whose examples cannot be looked at has the router that it has kept or starts with; the log says so.
        """
        kept = self.kept_routers(name)
        if self.arrivals.arrival is None:
            return kept
        found: list[tuple[ClientId, PrivateState]] = []
        for client_id, turn in self.everybody("train", round):
            try:
                found.append((client_id, {name: self.arrivals(turn()).private[name]}))
            except Exception as error:  # as in training: a client's failure is its own loss
                who = "" if isinstance(error, UpdateError) else f"client {client_id!r}: {type(error).__name__}: "
                logger.warning("%s%s; its router is the one that it had", who, error)
        gathered = self._processes.gather(pack_states(found))
        return kept | self._told([item for part in gathered for item in unpack_states(part)])

    def kept_routers(self, name: str) -> dict[ClientId, Tensor]:
        """The routers, (1, L, C), that clients have stored."""
        return self._told([(client_id, {name: self.private(client_id)[name]}) for client_id in self._store.clients()])

    def _told(self, mains: list[tuple[ClientId, PrivateState]]) -> dict[ClientId, Tensor]:
        """What the main process has found for clients, a tensor each, in every process."""
        known = mains if self._processes.count == 1 else unpack_states(self._processes.broadcast(pack_states(mains)))
        return {client_id: value for client_id, state in known for value in state.values()}


def _up_to(size: int, chunks: Iterable[Mapping[ClientId, Private]]) -> Iterator[list[Mapping[ClientId, Private]]]:
    """Chunks in lists of so many clients at most, or of one larger chunk."""
    several: list[Mapping[ClientId, Private]] = []
    for chunk in chunks:
        if several and sum(map(len, several)) + len(chunk) > size:
            yield several
            several = []
        several.append(chunk)
    if several:
        yield several
