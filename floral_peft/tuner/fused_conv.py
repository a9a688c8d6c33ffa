"""A convolution with its adaptors as one autograd operation, for one client: see `fused`.

The forward pass and the input's gradient use the merged kernel, so they cost what the base layer's do. Where the base
trains, the factors' gradients come from the kernel's. Where it is frozen, that gradient would be the dearest product
of the step, and two small convolutions give the factors' gradients without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from floral_peft.tuner.compute import composed_kernel, kernel_gradients
from floral_peft.tuner.fused import (
    Gradients,
    mixed_shift,
    scaled_second,
    second_gradients,
    shift_gradients,
    without_autocast,
)


class Stage(NamedTuple):
    """How a convolution moves over its input, an entry per axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]


class FusedConv(torch.autograd.Function):
    """`conv(x, W + Σ_c w_c B_c∘A_c) + b + Σ_c w_c β_c`, with w_c = s·π_c, padded with zeros and without groups.

    Args (of `apply`):
        x: (batch, in, ...).
        weight, bias: the base layer's, (out, in, *kernel) and (out,) or None.
        a, b, beta: the adaptors', (C, r, in, *k₁), (out, C, r, *k₂), and (C, out) or None.
        w: (C,).
        stages: of the layer, of its first factor and of its second.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        beta: Tensor | None,
        w: Tensor,
        stages: tuple[Stage, Stage, Stage],
    ) -> Tensor:
        """Returns (batch, out, ...)."""
        ctx.save_for_backward(x, weight, a, b, beta, w)
        ctx.stages = stages
        merged = weight + composed_kernel(a.flatten(0, 1), scaled_second(b, w).flatten(1, 2))
        return _convolve(x, merged, mixed_shift(bias, beta, w), stages[0])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Each gradient only where it is asked for."""
        x, weight, a, b, beta, w = ctx.saved_tensors
        of_x, of_weight, of_bias, of_a, of_b, of_beta, of_w = ctx.needs_input_grad[:7]
        (gradient,) = gradients
        whole, stage1, stage2 = ctx.stages
        first, second = a.flatten(0, 1), scaled_second(b, w).flatten(1, 2)
        to_x = to_weight = to_first = to_second = to_shift = to_beta = to_w = None
        if of_bias or of_beta or of_w:
            axes = [0, *range(2, gradient.dim())]  # asked of the convolution, the sum may bring the kernel's gradient
            to_shift, to_beta, to_w = shift_gradients(gradient.sum(axes), beta, w)
        if of_x:
            to_x = _input_gradient(gradient, x, weight + composed_kernel(first, second), whole)
        if of_a or of_b or of_w or of_weight:
            if of_weight or weight.numel() <= 2 * (a.numel() + b.numel()):
                to_weight = _weight_gradient(gradient, x, weight, whole)
                to_first, to_second = kernel_gradients(to_weight, first, second)
            else:
                hidden = _convolve(x, first, None, stage1)
                of_hidden = _input_gradient(gradient, hidden, second, stage2)
                to_second = _weight_gradient(gradient, hidden, second, stage2)
                to_first = _weight_gradient(of_hidden, x, first, stage1)
        to_b = None
        if to_second is not None and (of_b or of_w):
            to_b, to_w = second_gradients(to_second.view(b.shape), b, w, to_w)
        return (
            to_x,
            to_weight if of_weight else None,
            to_shift if of_bias else None,
            to_first.view(a.shape) if of_a and to_first is not None else None,
            to_b if of_b else None,
            to_beta if of_beta else None,
            to_w if of_w else None,
            None,
        )


def conv_by_example(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, beta: Tensor | None, w: Tensor, stage: Stage
) -> Tensor:
    """Each example under a merged kernel of its own, as the groups of one convolution. Not for autograd.

    On large images with few channels a kernel is small beside what it is used on. Arguments as of [`FusedConv`], but
    w is (batch, C) and `stage` the layer's own.

    Returns:
        (batch, out, ...).
    """
    second = b.unsqueeze(0) * w.view(len(w), 1, w.shape[1], *[1] * (b.dim() - 2))  # (batch, out, C, r, *k₂)
    kernels = composed_kernel(a.flatten(0, 1), second.flatten(0, 1).flatten(1, 2))
    kernels.view(len(x), *weight.shape).add_(weight)
    shift = bias
    if beta is not None:
        shift = w.mm(beta) if bias is None else torch.addmm(bias, w, beta)
    shift = None if shift is None else shift.expand(len(x), -1).reshape(-1)
    one = x.reshape(1, -1, *x.shape[2:])
    result = torch.convolution(one, kernels, shift, *stage, False, [0] * len(stage.stride), len(x))
    return result.view(len(x), -1, *result.shape[2:])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stage: Stage) -> Tensor:
    return torch.convolution(x, weight, bias, *stage, False, [0] * len(stage.stride), 1)


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stage: Stage) -> Tensor:
    return _gradients(gradient, x, weight, stage, [True, False, False])[0]


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stage: Stage) -> Tensor:
    return _gradients(gradient, x, weight, stage, [False, True, False])[1]


def _gradients(gradient: Tensor, x: Tensor, weight: Tensor, stage: Stage, wanted: list[bool]) -> Any:
    zeros = [0] * len(stage.stride)
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, *stage, False, zeros, 1, wanted)
