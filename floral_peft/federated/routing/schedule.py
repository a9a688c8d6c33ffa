"""The constants of the posterior router, in units that hold for any number of rounds and clients a round.

Time is counted in participations: a client that takes part in a share p of the rounds has taken part p·t times, on
average, after t of them.
"""

from __future__ import annotations

import math


#: γ: how much of a client's logits is left at its next participation. Old evidence is of adaptors that have moved.
CLIENT_MEMORY = 0.2
#: After so many participations the server's sums U and N have lost all but 1/e of what was in them.
SERVER_MEMORY = 2.0
#: How strongly the adaptors' users are kept even in the first round.
BALANCE = 3.0
#: Over so many participations that fades away.
BALANCED = 10.0
#: Standard deviation of the factors of adaptors that would otherwise start equal.
START_STD = 0.3


def server_decay(sampled: float) -> float:
    """δ: what a round leaves of the server's sums.

    Args:
        sampled: The share of the clients that take part in a round.
    """
    return math.exp(-sampled / SERVER_MEMORY)


def balanced_rounds(sampled: float) -> float:
    """Over how many rounds the balance fades away."""
    return BALANCED / sampled
