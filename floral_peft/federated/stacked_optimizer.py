"""The clients' optimisers for parameters stacked over clients: torch's rules, each client with its own step count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


#: Some of the stacked clients: a run of them, seen without a copy, or their rows in any order.
Chosen = slice | Tensor

Tensors = list[Tensor]


@dataclass(frozen=True)
class _Rule:
    """How one of torch's optimisers moves parameters.

    Args:
        memories: How many tensors it keeps of each parameter, with these options.
        move: (parameters, gradients, memories, steps, options): all tensors are (clients, ...) and changed in place;
            `steps` counts each client's steps, this one included, float64 on the CPU.
        neutral: Options that are not served, and the values at which they do nothing.
    """

    memories: Callable[[Mapping[str, Any]], int]
    move: Callable[[Tensors, Tensors, list[Tensors], Tensor, Mapping[str, Any]], None]
    neutral: Mapping[str, Any]


def _sgd(parameters: Tensors, gradients: Tensors, memories: list[Tensors], steps: Tensor, options: Any) -> None:
    if options["weight_decay"]:
        torch._foreach_add_(gradients, parameters, alpha=options["weight_decay"])
    for momentum in memories:
        torch._foreach_mul_(momentum, options["momentum"])
        torch._foreach_add_(momentum, gradients)
        if options["nesterov"]:
            torch._foreach_add_(gradients, momentum, alpha=options["momentum"])
        else:
            gradients = momentum
    torch._foreach_add_(parameters, gradients, alpha=-options["lr"])


def _adam(parameters: Tensors, gradients: Tensors, memories: list[Tensors], steps: Tensor, options: Any) -> None:
    (mean, square), (beta1, beta2) = memories, options["betas"]
    if options["decoupled_weight_decay"]:
        torch._foreach_mul_(parameters, 1 - options["lr"] * options["weight_decay"])
    elif options["weight_decay"]:
        torch._foreach_add_(gradients, parameters, alpha=options["weight_decay"])
    torch._foreach_lerp_(mean, gradients, 1 - beta1)
    torch._foreach_mul_(square, beta2)
    torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
    rates = options["lr"] / (1 - beta1**steps)
    scales = (1 - beta2**steps).sqrt()
    for parameter, first, second in zip(parameters, mean, square, strict=True):
        root = second.sqrt().div_(_along(scales, second)).add_(options["eps"])
        parameter.sub_((first / root).mul_(_along(rates, first)))


def _along(values: Tensor, like: Tensor) -> Tensor:
    """One value per client, shaped to scale a stacked tensor."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


_ADAM = _Rule(lambda options: 2, _adam, {"amsgrad": False, "maximize": False})
_RULES: dict[type[torch.optim.Optimizer], _Rule] = {
    torch.optim.SGD: _Rule(lambda options: int(options["momentum"] != 0), _sgd, {"dampening": 0, "maximize": False}),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}


def unserved(optimizer: torch.optim.Optimizer) -> str | None:
    """Why this optimiser has no rule here, or None if it has one."""
    rule = _RULES.get(type(optimizer))
    if rule is None:
        known = ", ".join(sorted(kind.__name__.lower() for kind in _RULES))
        return f"optimizer={type(optimizer).__name__.lower()!r} is none of {known}"
    for name, value in rule.neutral.items():
        if optimizer.defaults[name] != value:
            return f"optimizer={type(optimizer).__name__.lower()!r} is given {name}={optimizer.defaults[name]!r}"
    return None


class StackedOptimizer:
    """Steps of some of the clients; the others' parameters, memories and step counts stay as they are.

    Args:
        optimizer: One of torch's, over the stacked parameters (clients, ...), for its options.
        num_clients: How many clients are stacked.

    Raises:
        ValueError: There is no rule for the optimiser.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_clients: int) -> None:
        reason = unserved(optimizer)
        if reason is not None:
            raise ValueError(reason)
        self._rule = _RULES[type(optimizer)]
        self._groups: list[dict[str, Any]] = optimizer.param_groups
        self._steps = torch.zeros(num_clients, dtype=torch.float64)
        self._memories: list[list[Tensors]] = [
            [[torch.zeros_like(parameter) for parameter in group["params"]] for _ in range(self._rule.memories(group))]
            for group in self._groups
        ]

    @torch.no_grad()
    def step(self, chosen: Chosen, gradients: Mapping[Tensor, Tensor]) -> None:
        """Move the chosen clients' parameters.

        Args:
            chosen: The clients.
            gradients: Stacked parameter → its gradient for the chosen clients, in their order. It is changed.
        """
        self._steps[chosen] += 1
        for group, memories in zip(self._groups, self._memories, strict=True):
            given = [gradients[parameter] for parameter in group["params"]]
            parameters = [parameter[chosen] for parameter in group["params"]]
            memory = [[tensor[chosen] for tensor in tensors] for tensors in memories]
            self._rule.move(parameters, given, memory, self._steps[chosen], group)
            if isinstance(chosen, Tensor):
                for whole, part in zip([group["params"], *memories], [parameters, *memory], strict=True):
                    for tensor, moved in zip(whole, part, strict=True):
                        tensor[chosen] = moved
