"""What clients find when they arrive, be it to train or to be evaluated: each alone, or several at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from floral_peft.federated.turn import Arrival, Arrived, Turn, look_together


logger = logging.getLogger(__name__)

#: Examples of clients that arrive together are in memory together: so many evaluation batches at most.
BATCHES = 8
#: So many clients are evaluated together.
GROUP = 32

#: The parts of a client's training examples whose pure losses it will ask for on arrival, as rows; none: nothing.
Examined = Callable[[Turn], Sequence[Tensor]]


class Arrivals:
    """Calls each client's arrival.

    Args:
        arrival: What a client does; None: nothing.
        examined: What it will look at, where clients that arrive together can look together; None: they cannot.

    Attributes:
        shared: Whether they can.
    """

    def __init__(self, arrival: Arrival | None, examined: Examined | None = None) -> None:
        self.arrival = arrival
        self._examined = None if arrival is None else examined
        self.shared = self._examined is not None

    def __call__(self, turn: Turn) -> Arrived:
        """What a client finds before it goes to work."""
        return Arrived(turn.private) if self.arrival is None else self.arrival(turn)

    def foresee(self, turns: Sequence[Turn]) -> None:
        """Have clients look at their examples together, in as few passes as these fit into.

        What comes of it when they arrive is the same, up to rounding. Whatever goes wrong here goes wrong there, too,
        and is that client's loss.

        Args:
            turns: Clients in whose models only the routers differ.
        """
        if self._examined is None or len(turns) < 2:
            return
        try:
            for group, parts in _groups(turns, self._examined):
                for turn, losses in zip(group, look_together(group, parts), strict=True):
                    turn.foresee(losses)
        except Exception as error:
            logger.debug("%d clients do not look at their examples together: %s", len(turns), error)


def _groups(turns: Sequence[Turn], examined: Examined) -> Iterator[tuple[list[Turn], list[Sequence[Tensor]]]]:
    """Clients with something to look at, in groups with so many examples at most."""
    group: list[Turn] = []
    asked: list[Sequence[Tensor]] = []
    size = 0
    for turn in turns:
        parts = examined(turn)
        count = sum(map(len, parts))
        if group and size + count > BATCHES * turn.args.per_device_eval_batch_size:
            yield group, asked
            group, asked, size = [], [], 0
        if count:
            group.append(turn)
            asked.append(parts)
            size += count
    if group:
        yield group, asked
