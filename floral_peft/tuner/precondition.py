"""Preconditioned gradients of low-rank factors (FLoRAL's training; the metric of scaled gradient descent)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from floral_peft.tuner.clip import clip_adaptors, clip_steps
from floral_peft.tuner.factors import Pair, at_least_float32, factor_pairs, stack_matrices


DAMPING = 0.1


@torch.no_grad()
def precondition_gradients(
    factors: nn.Module | Iterable[Pair],
    damping: float = DAMPING,
    epsilon: float | None = None,
    max_norm: float | None = None,
) -> None:
    """Scale the gradients of all low-rank factors by the other factor's inverse Gram matrix, in place.

        G_B ← G_B (A Aᵀ + εI)⁻¹,    G_A ← (Bᵀ B + εI)⁻¹ G_A

    A step along these directions changes the product B A, not the arbitrary way it is split between its factors. The
    paper takes ε = 1e-5, with which the gradient explodes near the start, where B = 0: G_A is multiplied by up to 1e5.
    Here ε is `damping` times the mean eigenvalue of *both* factors' Gram matrices: it follows the scale of the
    factors, and where B = 0 it is still set by A.

    Factors of a convolution are taken as matrices, (r, in·k₁) and (out·k₂, r). Layers whose factors have one shape are
    solved in one batch.

    Args:
        factors: a model, or (in a loop, where the walk over the model would be repeated) its `factor_pairs`. Factors
            without a gradient are passed over.
        damping: relative damping, above 0.
        epsilon: ε itself, above 0, in place of a relative one: 1e-5 is the paper's.
        max_norm: m, above 0: the adaptors' steps are clipped, too, as by [`clip_steps`] afterwards, but with the Gram
            matrices that are at hand. None: they are not.

    Raises:
        ValueError: `damping`, `epsilon` or `max_norm` is not above 0.
    """
    for name, value in (("damping", damping), ("epsilon", epsilon), ("max_norm", max_norm)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0.")
    pairs = factor_pairs(factors) if isinstance(factors, nn.Module) else factors
    batches: dict[tuple[object, ...], list[Pair]] = defaultdict(list)
    for a, b in pairs:
        if a.grad is not None or b.grad is not None:
            # of rank one, all that counts of a factor is its norm: shapes do not matter
            shapes = (1,) if a.shape[1] == 1 else (a.shape, b.shape, a.grad is None, b.grad is None)
            batches[(a.dtype, a.device, *shapes)].append((a, b))
    for batch in batches.values():
        if batch[0][0].shape[1] == 1:
            _precondition_vectors(batch, damping, epsilon)
            if max_norm is not None:
                clip_steps(batch, max_norm)
        else:
            _precondition_matrices(batch, damping, epsilon, max_norm)


def _precondition_vectors(pairs: list[Pair], damping: float, absolute: float | None) -> None:
    """Of rank one: every Gram matrix is a number, and those of all layers' adaptors stand in one vector."""
    counts = [len(a) for a, _ in pairs]
    dtype = at_least_float32(pairs[0][0].dtype)
    gram_a = torch.cat([_norms(a, 0, dtype) for a, _ in pairs]).square_()
    gram_b = torch.cat([_norms(b, 1, dtype) for _, b in pairs]).square_()
    epsilon = _epsilon(gram_a + gram_b, damping / 2, absolute)
    gradients, divisors = [], []
    of_a, of_b = gram_b.add_(epsilon).split(counts), gram_a.add_(epsilon).split(counts)
    for (a, b), for_a, for_b in zip(pairs, of_a, of_b, strict=True):
        for factor, divisor, axis in ((a, for_a, 0), (b, for_b, 1)):
            if factor.grad is not None:
                gradients.append(factor.grad)
                divisors.append(divisor.view(-1, *[1] * (factor.dim() - 1 - axis)))
    torch._foreach_div_(gradients, divisors)


def _norms(factor: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """The norm of each adaptor's slice, (C,); C lies along `axis`."""
    return torch.linalg.vector_norm(factor, dim=[d for d in range(factor.dim()) if d != axis], dtype=dtype)


def _precondition_matrices(pairs: list[Pair], damping: float, absolute: float | None, max_norm: float | None) -> None:
    """Of a higher rank, for layers of one shape: matrices below are (layers, C, ...)."""
    a, b = stack_matrices([a for a, _ in pairs]), stack_matrices([b.movedim(0, 2) for _, b in pairs])
    rank = a.shape[-2]
    gram_a, gram_b = a @ a.mT, b @ b.mT
    one = _epsilon((gram_a + gram_b).diagonal(dim1=-2, dim2=-1).sum(-1), damping / (2 * rank), absolute)
    epsilon = torch.diag_embed(one.unsqueeze(-1).expand(*one.shape, rank))
    _scale(_inverse(gram_b + epsilon), [a.grad for a, _ in pairs if a.grad is not None])
    _scale(_inverse(gram_a + epsilon), [b.grad.movedim(0, 2) for _, b in pairs if b.grad is not None])
    if max_norm is not None:
        clip_adaptors(pairs, max_norm, (gram_a, gram_b))


def _epsilon(traces: Tensor, share: float, absolute: float | None) -> Tensor:
    """ε for each adaptor: a share of its Gram matrices' traces, or a number."""
    if absolute is not None:
        return torch.full_like(traces, absolute)
    epsilon = traces.mul_(share)
    epsilon += epsilon == 0  # there is no metric: leave the gradient as it is
    return epsilon


def _inverse(gram: Tensor) -> Tensor:
    """Gram⁻¹, found in float64 where the device has it.

    Solving for each gradient instead, thousands of columns for a matrix of r × r, takes some fifteen times as long on
    a CPU, and in float32 it is less exact.
    """
    exact = gram if gram.device.type == "mps" else gram.double()
    return torch.linalg.inv(exact).to(gram.dtype)


def _scale(inverse: Tensor, gradients: list[Tensor]) -> None:
    """Replace each layer's gradient G, a view (C, r, ...), by gram⁻¹ G."""
    if gradients:
        for gradient, scaled in zip(gradients, inverse @ stack_matrices(gradients), strict=True):
            gradient.copy_(scaled.view(gradient.shape))
