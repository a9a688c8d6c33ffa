"""What is done to gradients before a step, for gradients stacked over clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor


#: Changes the gradients of low-rank factors (A, B), as `precondition_gradients` and `clip_steps` do.
FactorChange = Callable[[list[tuple[Tensor, Tensor]]], None]


def change_stacked(
    changes: Sequence[FactorChange],
    pairs: Sequence[tuple[str, str]],
    factors: Mapping[str, Tensor],
    gradients: dict[str, Tensor],
) -> None:
    """Change the gradients of all clients' adaptors as if they were one client's: to it, they are more adaptors.

    Args:
        changes: What is done to them, in order; it treats each adaptor by itself.
        pairs: The names of the low-rank factors A and B of each layer.
        factors: Factors by name, A (clients, C, r, ...) and B (clients, out, C, r, ...).
        gradients: Their gradients by name, where there are any; they are replaced.
    """
    wide: list[tuple[Tensor, Tensor]] = []
    for first, second in pairs:
        a, b = _wide_a(factors[first]), _wide_b(factors[second])
        a.grad = _wide_a(gradients[first]) if first in gradients else None
        b.grad = _wide_b(gradients[second]) if second in gradients else None
        wide.append((a, b))
    for change in changes:
        change(wide)
    for names, (a, b) in zip(pairs, wide, strict=True):
        first, second = names
        if a.grad is not None:
            gradients[first] = a.grad.view(factors[first].shape)
        if b.grad is not None:
            clients, _, count = factors[second].shape[:3]
            gradients[second] = b.grad.unflatten(1, (clients, count)).movedim(1, 0)


def clip_weights_stacked(weights: Iterable[str], gradients: Mapping[str, Tensor], max_norm: float) -> None:
    """`clip_steps` of every client's base weights.

    Args:
        weights: The names of the base weights.
        gradients: Gradients by name, (clients, ...), where there are any; they are changed in place.
        max_norm: Most that a weight may move in a step of rate 1.
    """
    for name in weights:
        if (gradient := gradients.get(name)) is not None:
            norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
            scales = (max_norm / norms).clamp(max=1.0)
            if norms.device.type != "cpu":  # others would wait to be told which are long
                gradient.mul_(scales.view(-1, *[1] * (gradient.dim() - 1)))
                continue
            for row, scale in enumerate(scales.tolist()):
                if scale != 1.0:
                    gradient[row].mul_(scale)


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
