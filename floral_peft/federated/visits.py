"""Which process visits which client, and how the client's private tensors come to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice

from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.processes import Message, Processes, deal, pack_states, unpack_states
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.segments import StoreError
from floral_peft.federated.server import PrivateState


#: Clients whose private tensors are on their way at a time: bounds the memory of a look at everybody.
BLOCK = 1024

PrivateOf = Callable[[ClientId], PrivateState]

#: Gives one client's private tensors, or raises `StoreError`.
Private = Callable[[], PrivateState]


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
    ) -> Iterator[tuple[ClientId, Private]]:
        """Those of some clients that this process is to visit.

        Args:
            client_ids: The clients; the same in all processes.
            private: Reads a client's private tensors, on the main process, which sends them to the others.
            split: The split whose number of examples says what a visit costs; None: all visits cost the same.

        Yields:
            A client, and a function that gives its private tensors or raises [`StoreError`].
        """
        for group in self.together(([client_id] for client_id in client_ids), private, split):
            yield from group.items()

    def together(
        self, groups: Iterable[Sequence[ClientId]], private: PrivateOf, split: str | None = None
    ) -> Iterator[dict[ClientId, Private]]:
        """The same for groups of clients that one process must visit: yields whole groups."""
        if self._processes.count == 1:
            for group in groups:
                yield {client_id: partial(private, client_id) for client_id in group}
            return
        for block in _blocks(groups):
            messages = self._messages(block, private, split) if self._processes.is_main else None
            received = unpack_states(self._processes.scatter(messages))
            for _, members in groupby(received, key=lambda item: item[0][0]):
                yield {client_id: partial(_received, state, error) for (_, client_id, error), state in members}

    def _messages(self, groups: list[Sequence[ClientId]], private: PrivateOf, split: str | None) -> list[Message]:
        costs = [sum(1 if split is None else self._examples(k, split) for k in group) for group in groups]
        shares = deal(costs, self._processes.count)
        return [
            pack_states(_sent(position, client_id, private) for position in share for client_id in groups[position])
            for share in shares
        ]

    def _examples(self, client_id: ClientId, split: str) -> int:
        """A client's examples; 0 for one whose data cannot be read, which will say so itself."""
        try:
            return self._dataset.num_examples(client_id, split)
        except Exception:
            return 0


def in_groups(client_ids: Iterable[ClientId], size: int) -> Iterator[list[ClientId]]:
    """Clients in groups of so many, in order."""
    left = iter(client_ids)
    while group := list(islice(left, size)):
        yield group


def _blocks(groups: Iterable[Sequence[ClientId]]) -> Iterator[list[Sequence[ClientId]]]:
    block: list[Sequence[ClientId]] = []
    size = 0
    for group in groups:
        block.append(group)
        size += len(group)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _sent(
    group: int, client_id: ClientId, private: PrivateOf
) -> tuple[tuple[int, ClientId, str | None], PrivateState]:
    """A client of a group and its private tensors, or why they cannot be read."""
    try:
        return (group, client_id, None), private(client_id)
    except StoreError as error:
        return (group, client_id, str(error)), {}


def _received(private: PrivateState, error: str | None) -> PrivateState:
    if error is not None:
        raise StoreError(error)
    return private
