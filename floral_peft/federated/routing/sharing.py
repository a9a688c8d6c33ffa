"""Whether clients are better off with one adaptor for all: a comparison that over-confidence does not spoil.

A client that has learned its few examples by heart is sure of itself, rightly or not, and its loss on others is high
for that alone. So each of the two models is judged by the cross entropy at the temperature that is best for it, the
same for all clients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from floral_peft.federated.routing import schedule


TEMPERATURES = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
#: What the server remembers of it: the sums of losses at each temperature under clients' own adaptors and under the
#: mean of all; of the squares of their differences, (T of own, T of mean); and how many have compared.
SUMS = {
    "own": torch.Size([len(TEMPERATURES)]),
    "mean": torch.Size([len(TEMPERATURES)]),
    "gaps": torch.Size([len(TEMPERATURES), len(TEMPERATURES)]),
    "compared": torch.Size([1]),
}
_NOTHING = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SUMS.items()}


def nothing() -> dict[str, Tensor]:
    """What a client says that has not compared."""
    return dict(_NOTHING)


def compared(own: Tensor | None, mean: Tensor | None) -> dict[str, Tensor]:
    """What a client says of its losses on examples that it does not train on.

    Args:
        own: Under its own mixture, at each temperature, (T,), float64; None where there are none.
        mean: Under the mean of all adaptors.
    """
    if own is None or mean is None:
        return nothing()
    gaps = (mean - own.unsqueeze(1)).square()
    return {"own": own, "mean": mean, "gaps": gaps, "compared": torch.ones(1, dtype=torch.float64)}


def is_better(memory: Mapping[str, Tensor], clients: Tensor) -> bool:
    """Whether the mean's losses are lower, each at its best temperature, by two standard errors.

    Args:
        memory: The server's, with `SUMS`.
        clients: How many clients they are of, (1,).
    """
    count = memory["compared"]
    if not float(count) > 0:
        return False
    own, mean = memory["own"] / count, memory["mean"] / count
    first, second = int(own.argmin()), int(mean.argmin())
    gap = mean[second] - own[first]
    spread = (memory["gaps"][first, second] / count - gap.square()).clamp(min=0)
    return bool(gap + schedule.POOLED_CAUTION * (spread / clients).sqrt() < 0)
