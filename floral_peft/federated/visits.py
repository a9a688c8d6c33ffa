"""Which process visits which client, and how the client's private tensors come to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.processes import Message, Processes, deal, pack_states, unpack_states
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.segments import StoreError
from floral_peft.federated.server import PrivateState


#: Clients whose private tensors are on their way at a time: bounds the memory of a look at everybody.
BLOCK = 1024

PrivateOf = Callable[[ClientId], PrivateState]


class Visits:
    """Deals clients out to the processes of a run by what their visits cost.

    Args:
        processes: The processes.
        dataset: The clients.
    """

    def __init__(self, processes: Processes, dataset: FederatedDataset) -> None:
        self._processes = processes
        self._dataset = dataset

    def __call__(
        self, client_ids: Iterable[ClientId], private: PrivateOf, split: str | None = None
    ) -> Iterator[tuple[ClientId, Callable[[], PrivateState]]]:
        """Those of some clients that this process is to visit.

        Args:
            client_ids: The clients; the same in all processes.
            private: Reads a client's private tensors, on the main process, which sends them to the others.
            split: The split whose number of examples says what a visit costs; None: all visits cost the same.

        Yields:
            A client, and a function that gives its private tensors or raises [`StoreError`].
        """
        if self._processes.count == 1:
            for client_id in client_ids:
                yield client_id, partial(private, client_id)
            return
        remaining = iter(client_ids)
        while block := list(islice(remaining, BLOCK)):
            messages = self._messages(block, private, split) if self._processes.is_main else None
            for (client_id, error), state in unpack_states(self._processes.scatter(messages)):
                yield client_id, partial(_received, state, error)

    def _messages(self, client_ids: list[ClientId], private: PrivateOf, split: str | None) -> list[Message]:
        costs = [1 if split is None else self._examples(client_id, split) for client_id in client_ids]
        shares = deal(costs, self._processes.count)
        return [pack_states(_sent(client_ids[position], private) for position in share) for share in shares]

    def _examples(self, client_id: ClientId, split: str) -> int:
        """A client's examples; 0 for one whose data cannot be read, which will say so itself."""
        try:
            return self._dataset.num_examples(client_id, split)
        except Exception:
            return 0


def _sent(client_id: ClientId, private: PrivateOf) -> tuple[tuple[ClientId, str | None], PrivateState]:
    """A client and its private tensors, or why they cannot be read."""
    try:
        return (client_id, None), private(client_id)
    except StoreError as error:
        return (client_id, str(error)), {}


def _received(private: PrivateState, error: str | None) -> PrivateState:
    if error is not None:
        raise StoreError(error)
    return private
