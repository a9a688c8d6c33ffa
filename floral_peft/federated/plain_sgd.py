"""Stochastic gradient descent without memory, in as few operations as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class PlainSGD:
    """The step of `torch.optim.SGD` without momentum, θ ← θ − η (g + λθ), bit for bit.

    An optimiser of torch looks through its hooks, states and parameters at every step. A client makes few steps on a
    small model and forgets its optimiser, so that looking can take longer than the step.

    Args:
        groups: Parameter groups as for `torch.optim.SGD`, each with its `params`, `lr` and `weight_decay`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = [(list(group["params"]), group["lr"], group["weight_decay"]) for group in groups]

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for parameters, rate, decay in self._groups:
            moved = [parameter for parameter in parameters if parameter.grad is not None]
            gradients: Any = [parameter.grad for parameter in moved]
            if moved and decay:
                gradients = torch._foreach_add(gradients, moved, alpha=decay)
            if moved:
                torch._foreach_add_(moved, gradients, alpha=-rate)
