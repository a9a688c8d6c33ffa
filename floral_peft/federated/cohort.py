"""Local training of a round's clients, and the simplest kind of it: one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from datasets import Dataset

from floral_peft.federated.batches import Examples
from floral_peft.federated.client import LocalTraining
from floral_peft.federated.rounds import Outcome
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.server import PrivateState, ServerState


#: Gives a client's training examples and its private tensors. If it raises, that is the client's loss.
Load = Callable[[ClientId], tuple[Dataset | Examples, PrivateState]]


class CohortTraining(Protocol):
    """Local training of many clients."""

    def chunks(self, client_ids: Sequence[ClientId]) -> list[list[ClientId]]:
        """The clients in groups that one process must train together, whatever the number of processes."""

    def __call__(self, client_ids: Sequence[ClientId], load: Load, state: ServerState) -> Iterator[Outcome]:
        """Train clients for one round.

        Args:
            client_ids: The clients.
            load: Gives a client's training examples and its private tensors.
            state: The server's state.

        Yields:
            For each client in order, what it sends and keeps, or the exception that cost it its update.
        """


class InTurn:
    """Trains clients one after the other.

    Args:
        training: Trains one client.
    """

    def __init__(self, training: LocalTraining) -> None:
        self._training = training

    def chunks(self, client_ids: Sequence[ClientId]) -> list[list[ClientId]]:
        """Each client is a group of its own."""
        return [[client_id] for client_id in client_ids]

    def __call__(self, client_ids: Sequence[ClientId], load: Load, state: ServerState) -> Iterator[Outcome]:
        """Train clients for one round: see `CohortTraining`."""
        for client_id in client_ids:
            yield attempt(self._training, client_id, load, state)


def attempt(training: LocalTraining, client_id: ClientId, load: Load, state: ServerState) -> Outcome:
    """What comes of one client's training, whatever it raises."""
    try:
        return training(client_id, *load(client_id), state)
    except Exception as error:  # whatever a client's data, model code or memory does is the client's own loss
        return error
