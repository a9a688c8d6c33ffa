"""What is done to gradients before a step, for gradients stacked over clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from floral_peft.tuner import clip_steps, precondition_gradients


def precondition_stacked(
    pairs: Sequence[tuple[str, str]],
    factors: Mapping[str, Tensor],
    gradients: dict[str, Tensor],
    epsilon: float | None = None,
) -> None:
    """`precondition_gradients` for every client at once: to it, a client's adaptors are more adaptors.

    Args:
        pairs: The names of the low-rank factors A and B of each layer.
        factors: Factors by name, A (clients, C, r, ...) and B (clients, out, C, r, ...).
        gradients: Their gradients by name, where there are any; they are replaced.
        epsilon: As there.
    """
    _on_wide(partial(precondition_gradients, epsilon=epsilon), pairs, factors, gradients)


def clip_steps_stacked(
    pairs: Sequence[tuple[str, str]],
    factors: Mapping[str, Tensor],
    weights: Iterable[str],
    gradients: dict[str, Tensor],
    max_norm: float,
) -> None:
    """`clip_steps` for every client at once.

    Args:
        pairs: As above.
        factors: As above.
        weights: The names of the base weights.
        gradients: The gradients of both by name, (clients, ...), where there are any; they are replaced.
        max_norm: Most that a weight may move.
    """
    for name in weights:
        if (gradient := gradients.get(name)) is not None:
            norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
            gradients[name] = gradient * (max_norm / norms).clamp(max=1.0).view(-1, *[1] * (gradient.dim() - 1))
    _on_wide(partial(clip_steps, max_norm=max_norm), pairs, factors, gradients)


def _on_wide(
    function: Callable[[list[tuple[Tensor, Tensor]]], None],
    pairs: Sequence[tuple[str, str]],
    factors: Mapping[str, Tensor],
    gradients: dict[str, Tensor],
) -> None:
    """Let a function change the gradients of all clients' adaptors as if they were one client's."""
    wide: list[tuple[Tensor, Tensor]] = []
    for first, second in pairs:
        a, b = _wide_a(factors[first]), _wide_b(factors[second])
        a.grad = _wide_a(gradients[first]) if first in gradients else None
        b.grad = _wide_b(gradients[second]) if second in gradients else None
        wide.append((a, b))
    function(wide)
    for names, (a, b) in zip(pairs, wide, strict=True):
        first, second = names
        if a.grad is not None:
            gradients[first] = a.grad.view(factors[first].shape)
        if b.grad is not None:
            clients, _, count = factors[second].shape[:3]
            gradients[second] = b.grad.unflatten(1, (clients, count)).movedim(1, 0)


def _wide_a(tensor: Tensor) -> Tensor:
    """(clients, C, ...) as (clients·C, ...)."""
    return tensor.detach().flatten(0, 1)


def _wide_b(tensor: Tensor) -> Tensor:
    """(clients, out, C, ...) as (out, clients·C, ...)."""
    return tensor.detach().movedim(0, 1).flatten(1, 2)


def clip_stacked(gradients: Iterable[Tensor], max_norm: float) -> None:
    """`clip_grad_norm_` for every client: all its gradients together get at most this norm, in place."""
    held = list(gradients)
    norms = torch.stack([torch.linalg.vector_norm(value.flatten(1), dim=1) for value in held])  # (tensors, clients)
    factors = (max_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for value in held:
        value.mul_(factors.view(-1, *[1] * (value.dim() - 1)))
