"""What clients find when they arrive, be it to train or to be evaluated: each alone, or several at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from floral_peft.federated.evidence import Piece
from floral_peft.federated.turn import Arrival, Arrived, Turn, look_together


logger = logging.getLogger(__name__)

#: Examples of clients that arrive together are in memory together: so many evaluation batches at most.
BATCHES = 8
#: So many clients look together: when they are evaluated, and when they train one after the other.
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

    def foresee(self, groups: Iterable[Sequence[Turn]]) -> None:
        """Have clients look at their examples together.

        What comes of it when they arrive is the same: up to rounding for those of a group, who look in as few passes
        as their examples fit into, and bit by bit for a client that is alone in its group. Whatever goes wrong here
        goes wrong there, too, and is that client's loss.

        Args:
            groups: Clients in whose models only the routers differ.
        """
        if self._examined is None:
            return
        try:
            for together in _bounded(groups, self._examined):
                turns = [turn for group in together for turn, _ in group]
                for turn, losses in zip(turns, look_together(together), strict=True):
                    turn.foresee(losses)
        except Exception as error:
            logger.debug("clients do not look at their examples together: %s", error)


#: A client with the examples at which it looks.
Looking = tuple[Turn, Sequence[Piece]]


def _bounded(groups: Iterable[Sequence[Turn]], examined: Examined) -> Iterator[list[list[Looking]]]:
    """Clients with something to look at, so many at a time that their examples are not too many.

    One whose examples cannot be read is left out: it says so itself when it arrives.
    """
    held: list[list[Looking]] = []
    size = 0
    for group in groups:
        held.append([])
        for turn in group:
            try:
                pieces = turn.pieces(examined(turn))
            except Exception as error:
                logger.debug("client %r does not look at its examples with the others: %s", turn.client_id, error)
                continue
            count = sum(piece.size for piece in pieces)
            if size and size + count > BATCHES * turn.args.per_device_eval_batch_size:
                yield [one for one in held if one]
                held, size = [[]], 0
            if count:
                held[-1].append((turn, pieces))
                size += count
    if size:
        yield [one for one in held if one]
