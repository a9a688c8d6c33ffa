"""Whether routers are getting anywhere, and what to do if not."""

from __future__ import annotations

import math


#: Mixtures whose mean entropy is above this share of the most that it could be are uniform.
UNIFORM = 0.99
#: Before so many participations routers may well be uniform.
PATIENCE = 5.0

_TRAINED = (
    'adaptors that start equal give routers no gradient: use router_update="posterior", or start them apart '
    "(FloralConfig(init_std=0.3)) and raise router_learning_rate"
)
#: What helps, by `router_update`.
REMEDIES = {
    "gradient": _TRAINED,
    "mirror": _TRAINED,
    "posterior": "the adaptors' losses hardly differ: raise adaptor_learning_rate or the adaptors' rank. If clients "
    "are all alike, one adaptor is enough",
}


def stuck_at_uniform(entropy: float | None, num_adaptors: int, participations: float) -> bool:
    """Whether clients' mixtures are still uniform when they should not be any more.

    Args:
        entropy: The mean of their entropies in nats, where it is known.
        num_adaptors: C.
        participations: How often a client has taken part so far, on average.
    """
    if entropy is None or num_adaptors < 2 or participations < PATIENCE:
        return False
    return entropy > UNIFORM * math.log(num_adaptors)
