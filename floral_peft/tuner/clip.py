"""Clipped steps: no base weight and no adaptor, as the matrix that it adds, moves far in one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from floral_peft.tuner.factors import Pair, factor_pairs, stack_matrices
from floral_peft.tuner.roles import parameter_roles


def base_weights(model: nn.Module) -> list[Tensor]:
    """The base model's weights that train: its matrices and kernels, not its biases and scales."""
    roles = parameter_roles(model)
    return [
        p for name, p in model.named_parameters() if roles[name].kind == "base" and p.requires_grad and p.dim() > 1
    ]


@torch.no_grad()
def clip_steps(factors: nn.Module | Iterable[Pair], max_norm: float, weights: Iterable[Tensor] | None = None) -> None:
    """Scale gradients down, in place, so that a step of rate 1 moves no weight by more than `max_norm`.

        ‖G_W‖_F ≤ m for each base weight,    ‖G_B A + B G_A‖_F ≤ m for each adaptor (both gradients scaled alike)

    The second is, to first order, the step of the adaptor's matrix B A. It is found through r × r Gram matrices, never
    as a matrix of the weight's size. To be called last, after `precondition_gradients`, unless that clips already.
    Biases and scales are not clipped. Layers whose factors have one shape are computed in one batch.

    Args:
        factors: a model, or (in a loop, where the walk over the model would be repeated) its `factor_pairs`. Those
            without a gradient are passed over.
        max_norm: m, above 0.
        weights: the base weights; of a model, its `base_weights` by default.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r} must be above 0.")
    if isinstance(factors, nn.Module):
        weights = base_weights(factors) if weights is None else weights
        factors = factor_pairs(factors)
    gradients = [weight.grad for weight in weights or () if weight.grad is not None]
    if gradients:
        norms = torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, list(_scales(torch.stack(norms), max_norm).unbind()))
    batches: dict[tuple[object, ...], list[Pair]] = defaultdict(list)
    for a, b in factors:
        if a.grad is not None or b.grad is not None:
            batches[a.dtype, a.device, a.shape, b.shape].append((a, b))
    for batch in batches.values():
        clip_adaptors(batch, max_norm)


def clip_adaptors(pairs: list[Pair], max_norm: float, grams: tuple[Tensor, Tensor] | None = None) -> None:
    """For layers of one shape. Where a cheap bound says that a step is not long, no more is computed.

    Args:
        pairs: Their factors; one at least of each pair has a gradient.
        max_norm: See [`clip_steps`].
        grams: A Aᵀ and Bᵀ B, (layers, C, r, r), where they are known.
    """
    a, step_a = stack_matrices([a for a, _ in pairs]), stack_matrices([_gradient(a) for a, _ in pairs])
    b = stack_matrices([b.movedim(0, 2) for _, b in pairs])
    step_b = stack_matrices([_gradient(b).movedim(0, 2) for _, b in pairs])
    gram_a, gram_b = (a @ a.mT, b @ b.mT) if grams is None else grams
    known = (a, step_a, gram_a, b, step_b, gram_b)
    scales: Tensor | None = None
    if a.device.type == "cpu":  # others would have to wait for the answer
        bounds = _norms(step_b) * _root(gram_a) + _root(gram_b) * _norms(step_a)
        long = torch.logical_not(bounds <= max_norm)  # so a bound that is not finite is looked into
        count = int(long.sum())
        if not count:
            return
        if 2 * count < long.numel():  # fewer are worth a copy
            scales = torch.ones_like(bounds)
            scales[long] = _scales(_step_norms(*(matrices[long] for matrices in known)), max_norm)
    if scales is None:
        scales = _scales(_step_norms(*known), max_norm)  # (layers, C)
    for (a, b), scale in zip(pairs, scales, strict=True):
        if a.grad is not None:
            a.grad.mul_(scale.view(-1, *[1] * (a.dim() - 1)))
        if b.grad is not None:
            b.grad.mul_(scale.view(-1, *[1] * (b.dim() - 2)))


def _step_norms(a: Tensor, step_a: Tensor, gram_a: Tensor, b: Tensor, step_b: Tensor, gram_b: Tensor) -> Tensor:
    """‖G_B A + B G_A‖_F, of matrices (..., r, n) and, transposed, (..., r, m).

    Its square is ⟨G_BᵀG_B, A Aᵀ⟩ + 2 ⟨G_BᵀB, A G_Aᵀ⟩ + ⟨BᵀB, G_A G_Aᵀ⟩.
    """
    squares = (step_b @ step_b.mT) * gram_a + gram_b * (step_a @ step_a.mT)
    squares += 2 * (step_b @ b.mT) * (a @ step_a.mT)
    return squares.sum(dim=(-2, -1)).clamp(min=0).sqrt()


def _root(gram: Tensor) -> Tensor:
    """At least ‖·‖₂ of the matrix of which this is the Gram matrix: it is at most ‖gram‖_F^½, itself at most ‖·‖_F."""
    return gram.square().sum(dim=(-2, -1)).sqrt().sqrt()


def _norms(matrices: Tensor) -> Tensor:
    """‖·‖_F of matrices (..., r, n). `vector_norm` takes eight times as long where they are views with n outermost."""
    if matrices.is_contiguous():
        return torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return matrices.square().sum(dim=-1).sum(dim=-1).sqrt()


def _gradient(factor: Tensor) -> Tensor:
    return torch.zeros_like(factor) if factor.grad is None else factor.grad


def _scales(norms: Tensor, max_norm: float) -> Tensor:
    """min(1, m / norm), 1 for a norm of 0. A norm that is not finite stays visible in the gradient."""
    return (max_norm / norms).clamp(max=1.0)
