"""A layer with its adaptors as one autograd operation, for one client.

On small layers the time goes into the number of operations, each with its own node in autograd's graph, more than into
arithmetic. On large ones merging is cheap but, as separate operations, keeps a second weight for the backward pass;
here that weight is made again. So what is saved is what the base layer alone would save, and little more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


Gradients = tuple[Tensor | None, ...]


def without_autocast(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Run a backward pass in the dtypes of the forward one, wherever it is called."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor) -> Gradients:
        device = gradients[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *gradients)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *gradients)

    return run


def stacked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, beta: Tensor | None, w: Tensor
) -> tuple[Tensor, Tensor]:
    """What `StackedLinear` computes, (..., out), and the first factors' products with the rows of x, (rows, C·r)."""
    rows, first, second = x.flatten(0, -2), a.flatten(0, 1), b.flatten(1)
    hidden = rows.mm(first.T)
    scaled = _scaled(hidden, w, a.shape[1])
    if w.dim() == 1:
        shift = mixed_shift(bias, beta, w)
    elif beta is not None and len(rows) == len(w):
        shift = w.mm(beta) if bias is None else torch.addmm(bias, w, beta)  # each row's own
    else:
        shift = bias
        if beta is not None:  # each example's own: C more terms of the product
            scaled = torch.cat([scaled, w.repeat_interleave(len(rows) // len(w), 0)], 1)
            second = torch.cat([second, beta.T], 1)
    result = rows.mm(weight.T) if shift is None else torch.addmm(shift, rows, weight.T)
    result.addmm_(scaled, second.T)
    return (result if x.dim() == 2 else result.view(*x.shape[:-1], len(weight))), hidden


class StackedLinear(torch.autograd.Function):
    """`x Wᵀ + b + Σ_c w_c ((x A_cᵀ) B_cᵀ + β_c)`, with w_c = s·π_c: the adaptors beside the weight.

    Args (of `apply`):
        x: (..., in).
        weight, bias: the base layer's, (out, in) and (out,) or None.
        a, b, beta: the adaptors', (C, r, in), (out, C, r), and (C, out) or None.
        w: (C,), or (n, C) for n examples, whose rows lie together in x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, beta: Tensor | None, w: Tensor
    ) -> Tensor:
        """Returns (..., out)."""
        result, hidden = stacked_linear(x, weight, bias, a, b, beta, w)
        # the hidden numbers are made again where they would be many beside the input
        kept = hidden if 10 * hidden.shape[1] <= x.shape[-1] else None
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, a, b, beta, w, kept)
        return result

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Each gradient only where it is asked for."""
        x, weight, a, b, beta, w, hidden = ctx.saved_tensors
        of_x, of_weight, of_bias, of_a, of_b, of_beta, of_w = ctx.needs_input_grad
        rows, gradient = x.flatten(0, -2), gradients[0].flatten(0, -2)
        first, rank = a.flatten(0, 1), a.shape[1]
        if (of_b or of_w) and (hidden is None or torch.is_grad_enabled()):
            hidden = rows.mm(first.T)  # if a second derivative is wanted: what was saved has no history
        of_hidden = gradient.mm(b.flatten(1))
        to_shift = to_beta = to_w = None
        if of_bias or of_beta or of_w:
            of_shift = gradient.sum(0) if w.dim() == 1 else gradient.view(len(w), -1, gradient.shape[1]).sum(1)
            to_shift, to_beta, to_w = shift_gradients(of_shift, beta, w)
        if of_w:
            products = of_hidden * hidden
            if w.dim() == 1:
                own = products.sum(0).view(-1, rank).sum(1)
            else:
                own = products.view(len(w), -1, w.shape[1], rank).sum((1, 3))
            to_w = own if to_w is None else own + to_w
        of_hidden = _scaled(of_hidden, w, rank)
        return (
            gradient.mm(weight).addmm_(of_hidden, first).view(x.shape) if of_x else None,
            gradient.T.mm(rows) if of_weight else None,
            to_shift if of_bias else None,
            of_hidden.T.mm(rows).view(a.shape) if of_a else None,
            gradient.T.mm(_scaled(hidden, w, rank)).view(b.shape) if of_b else None,
            to_beta if of_beta else None,
            to_w,
        )


class MergedLinear(torch.autograd.Function):
    """`x (W + Σ_c w_c B_c A_c)ᵀ + b + Σ_c w_c β_c`: the adaptors in the weight. Arguments as of `StackedLinear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, beta: Tensor | None, w: Tensor
    ) -> Tensor:
        """Returns (..., out)."""
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, a, b, beta, w)
        merged = torch.addmm(weight, scaled_second(b, w).flatten(1), a.flatten(0, 1))
        return nn.functional.linear(x, merged, mixed_shift(bias, beta, w))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Each gradient only where it is asked for; those of the factors come from the merged weight's."""
        x, weight, a, b, beta, w = ctx.saved_tensors
        of_x, of_weight, of_bias, of_a, of_b, of_beta, of_w = ctx.needs_input_grad
        rows, gradient = x.flatten(0, -2), gradients[0].flatten(0, -2)
        first, second = a.flatten(0, 1), scaled_second(b, w).flatten(1)
        to_x = (gradient @ torch.addmm(weight, second, first)).view(x.shape) if of_x else None
        to_shift = to_beta = to_w = None
        if of_bias or of_beta or of_w:
            to_shift, to_beta, to_w = shift_gradients(gradient.sum(0), beta, w)
        to_weight = gradient.T @ rows if of_weight or of_a or of_b or of_w else None
        to_a = to_b = None
        if to_weight is not None:
            to_a = (second.T @ to_weight).view(a.shape) if of_a else None
            if of_b or of_w:
                to_b, to_w = second_gradients((to_weight @ first.T).view(b.shape), b, w, to_w)
        return (
            to_x,
            to_weight if of_weight else None,
            to_shift if of_bias else None,
            to_a,
            to_b if of_b else None,
            to_beta if of_beta else None,
            to_w if of_w else None,
        )


def fits(x: Tensor, weight: Tensor, factor: Tensor) -> bool:
    """Whether such an operation may stand in for separate ones: nothing looks inside.

    Args:
        x: the layer's input.
        weight: the base layer's.
        factor: one of the adaptors' factors; they are of one dtype and on one device.
    """
    return (
        x.dtype == weight.dtype == factor.dtype
        and type(x) in _PLAIN
        and type(factor) in _PLAIN
        and x.device == factor.device == weight.device
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled(x.device.type)
    )


_PLAIN = (Tensor, nn.Parameter)


# What the operations share


def scaled_second(b: Tensor, w: Tensor) -> Tensor:
    """w_c B_c, in B's shape (out, C, r, ...)."""
    return b * w.view(-1, *[1] * (b.dim() - 2))


def second_gradients(gradient: Tensor, b: Tensor, w: Tensor, to_w: Tensor | None) -> tuple[Tensor, Tensor]:
    """From the gradient of `scaled_second`: those of B and of w, the latter added to what is there."""
    own = (gradient * b).flatten(2).sum((0, 2))
    return scaled_second(gradient, w), own if to_w is None else own + to_w


def mixed_shift(bias: Tensor | None, beta: Tensor | None, w: Tensor) -> Tensor | None:
    """The mixed bias b + Σ_c w_c β_c, (out,), or None without biases."""
    if beta is None:
        return bias
    return torch.mv(beta.T, w) if bias is None else torch.addmv(bias, beta.T, w)


def shift_gradients(gradient: Tensor, beta: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient of the bias b + Σ_c w_c β_c, (out,) or an example's in each row: those of b, β and w."""
    if w.dim() == 1:
        return gradient, *((None, None) if beta is None else (torch.outer(w, gradient), beta @ gradient))
    return gradient.sum(0), *((None, None) if beta is None else (w.T @ gradient, gradient @ beta.T))


def _scaled(hidden: Tensor, w: Tensor, rank: int) -> Tensor:
    """Multiply adaptor c's r of the C·r columns by w_c, each example's rows by its own."""
    if w.dim() == 1:
        return hidden * w.repeat_interleave(rank)
    each = hidden.view(len(w), -1, w.shape[1], rank)
    return (each * w.view(len(w), 1, -1, 1)).view(hidden.shape)
