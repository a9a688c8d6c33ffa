"""The mixture's arithmetic as pure functions, for every layer whose adaptors are pairs of factors.

Names used throughout: C adaptors of rank r, π their weights in the mixture, s the scale of all of it, and, where there
is a shared adaptor, its rank-one terms, which everybody uses with weight 1. R is the number of rank-one terms in all.

    first factor   A  (C, r, in...)    seen without a copy as (C·r, in...)
    second factor  B  (out, C, r...)   seen without a copy as (out, C·r...)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass
class Factors:
    """One layer's adaptors, of one adapter name. `shared_*` are None without a shared adaptor, biases without bias."""

    a: Tensor  # (C, r, in...)
    b: Tensor  # (out, C, r...)
    bias: Tensor | None  # (C, out)
    shared_a: Tensor | None  # (1, s, in...)
    shared_b: Tensor | None  # (out, 1, s...)
    shared_bias: Tensor | None  # (1, out)
    scale: float  # s

    def first(self) -> Tensor:
        """All rank-one terms' first factors, (R, in...)."""
        stacked = self.a.flatten(0, 1)
        return stacked if self.shared_a is None else torch.cat([stacked, self.shared_a[0]])

    def second(self) -> Tensor:
        """All rank-one terms' second factors, (out, R...)."""
        stacked = self.b.flatten(1, 2)
        return stacked if self.shared_b is None else torch.cat([stacked, self.shared_b[:, 0]], dim=1)

    def scaled_hidden(self, hidden: Tensor, weights: Tensor, axis: int) -> Tensor:
        """Multiply the first factors' output by what each term counts: s·π_c for adaptor c's, s for the shared one's.

        Args:
            hidden: R numbers, or R for each group of a convolution, along `axis`.
            weights: π, (n, C); n is 1, or `hidden`'s first length.
            axis: counted from the end, negative.
        """
        weights = self._scaled(weights).to(hidden.dtype)
        rank, length = self.a.shape[1], hidden.shape[axis]
        if self.shared_a is None:
            split = hidden.unflatten(axis, (-1, weights.shape[1], rank))  # (groups, C, r)
            return (split * _along(weights, split.dim(), axis - 1)).flatten(axis - 2, axis)
        terms = weights.unsqueeze(-1).expand(-1, -1, rank).flatten(1)
        shared = terms.new_full((len(terms), self.shared_a.shape[1]), self.scale)
        terms = torch.cat([terms, shared], dim=1)
        return hidden * _along(terms.repeat(1, length // terms.shape[1]), hidden.dim(), axis)

    def scaled_second(self, weights: Tensor) -> Tensor:
        """All terms' second factors times what each term counts, (out, R...), for π of shape (1, C)."""
        weights = self._scaled(weights).to(self.b.dtype)
        stacked = (self.b * weights.view(1, -1, *[1] * (self.b.dim() - 2))).flatten(1, 2)
        if self.shared_b is None:
            return stacked
        return torch.cat([stacked, self._scaled(self.shared_b[:, 0])], dim=1)

    def mixed_bias(self, weights: Tensor) -> Tensor | None:
        """s·(Σ_c π_c β_c + β_shared), (n, out), for π of shape (n, C); None if the adaptors have no biases."""
        if self.bias is None:
            return None
        bias = weights.to(self.bias.dtype) @ self.bias
        return self._scaled(bias if self.shared_bias is None else bias + self.shared_bias)

    def _scaled(self, tensor: Tensor) -> Tensor:
        return tensor if self.scale == 1 else tensor * self.scale


def linear_delta(factors: Factors, weights: Tensor) -> Tensor:
    """s·Σ_c π_c B_c A_c (+ shared) as a matrix (out, in), for π of shape (1, C)."""
    return factors.scaled_second(weights) @ factors.first()


def conv_delta(factors: Factors, weights: Tensor) -> Tensor:
    """The kernel of the two convolutions in a row, (out, in, *kernel), for π of shape (1, C)."""
    return composed_kernel(factors.first(), factors.scaled_second(weights))


def composed_kernel(first: Tensor, second: Tensor) -> Tensor:
    """The kernel (out, in, *kernel) of a convolution with (R, in, *k₁) followed by one with (out, R, *k₂).

    Every axis of the kernel has size 1 in one of the factors, so composing them is an outer product over the axes.
    """
    axes = first.dim() - 2
    product = second.movedim(1, -1).flatten(0, -2) @ first.flatten(1)
    product = product.view(len(second), *second.shape[2:], *first.shape[1:])
    pairs = [axis for d in range(axes) for axis in (1 + d, 2 + axes + d)]
    kernel = [a * b for a, b in zip(first.shape[2:], second.shape[2:], strict=True)]
    return product.permute(0, 1 + axes, *pairs).reshape(len(second), first.shape[1], *kernel)


def kernel_gradients(gradient: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of `composed_kernel`, in its shape: those of both factors."""
    axes = first.dim() - 2
    split = [size for pair in zip(second.shape[2:], first.shape[2:], strict=True) for size in pair]
    split_axes = [*range(2, 2 + 2 * axes, 2)], [*range(3, 3 + 2 * axes, 2)]  # of k₂ and of k₁
    matrix = gradient.reshape(*gradient.shape[:2], *split).permute(0, *split_axes[0], 1, *split_axes[1])
    matrix = matrix.reshape(len(second) * prod(second.shape[2:]), -1)
    to_first = second.movedim(1, -1).flatten(0, -2).T @ matrix
    to_second = (matrix @ first.flatten(1).T).view(len(second), *second.shape[2:], len(first))
    return to_first.view(first.shape), to_second.movedim(-1, 1)


def per_example(weights: Tensor, batch: int, layer: str) -> Tensor:
    """One row per entry of a layer's batch dimension.

    Inside a model that dimension may be a multiple of the examples: beams in generation, tokens flattened into rows.
    Both keep an example's rows together.

    Args:
        weights: (n, ...), n = 1 or the number of examples.
        batch: length of the layer's batch dimension.
        layer: named in the error.
    """
    if len(weights) in (1, batch):
        return weights
    if batch % len(weights):
        raise ValueError(
            f"Layer {layer}: {len(weights)} clients were given for a batch of {batch}. "
            "Give one client, or one client per example."
        )
    return weights.repeat_interleave(batch // len(weights), dim=0)


def _along(weights: Tensor, dims: int, axis: int) -> Tensor:
    """View (n, m) so that it multiplies a tensor of `dims` dimensions: n along the first, m along `axis`."""
    shape = [1] * dims
    shape[axis] = weights.shape[1]
    if len(weights) > 1:
        shape[0] = len(weights)
    return weights.view(shape)
