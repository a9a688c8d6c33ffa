"""From a budget to a rank, and how a fresh adaptor's factors are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

from torch import Tensor, nn


def rank_of_budget(budget: float, layer_numel: int, numel_per_rank: int, min_rank: int = 1) -> int:
    """The largest rank whose factors take no more than `budget` of the layer's weight: r = max(r_min, ⌊ρmn/(m+n)⌋).

    Args:
        budget: ρ, the parameters of *one* adaptor relative to the layer's weight, in (0, 1].
        layer_numel: number of elements of the layer's weight (m·n for a Linear layer).
        numel_per_rank: number of elements that one unit of rank costs (m + n for a Linear layer).
        min_rank: the rank is never smaller, whatever the budget says.
    """
    # Decimal fractions such as 0.1 lie a hair off in binary: without the guard 0.1 * 30 could buy 2 instead of 3
    return max(min_rank, int(budget * layer_numel / numel_per_rank + 1e-9))


def kernel_split(split: str, channels_in: int, channels_out: int, kernel: Sequence[int]) -> tuple[bool, ...]:
    """Which axes of a convolution's kernel the first of the two factors gets; the second one gets the others.

    The adaptor is a convolution to r channels followed by one to `channels_out`. An axis belongs to exactly one of
    the two, with its kernel size, stride, padding and dilation; the other one has size 1 there. The forms are those of
    the FLoRAL paper's appendix on ConvLoRA:

    * `"in"` / `"out"`: the whole kernel in the first / second factor (`"linear"`, the matricised form
      (c_out·k₁k₂ × r)(r × c_in), is `"out"` written as matrices);
    * `"balanced"`: the whole kernel where there are fewer channels;
    * `"balanced_2d"`: the axes are dealt out so that the factors are smallest, each getting at least one:
      (c_min·k_max + c_max·k_min)·r parameters for a 2-D kernel.

    Axes of size 1 cost nothing anywhere and go first, so that a stride shrinks the image as early as it can.

    Args:
        split: one of the names above.
        channels_in: channels that one output of the layer sees (in_channels / groups).
        channels_out: out_channels.
        kernel: the kernel's size, one number per axis.
    """
    wide = [axis for axis, size in enumerate(kernel) if size > 1]

    def axes(chosen: Sequence[int]) -> tuple[bool, ...]:
        return tuple(size == 1 or axis in chosen for axis, size in enumerate(kernel))

    if split == "in":
        return axes(wide)
    if split in ("out", "linear"):
        return axes(())
    if split == "balanced" or len(wide) < 2:
        return axes(wide if channels_in <= channels_out else ())

    def cost(chosen: Sequence[int]) -> int:
        first = prod(kernel[axis] for axis in chosen)
        return channels_in * first + channels_out * (prod(kernel) // first)

    # among equals the last axes go first: conv 1×k, then conv k×1
    proper = [
        tuple(axis for position, axis in enumerate(wide) if bits >> position & 1)
        for bits in range(1, 2 ** len(wide) - 1)
    ]
    return axes(min(proper, key=lambda chosen: (cost(chosen), [-axis for axis in chosen])))


def init_factors(
    a: Tensor, b: Tensor, bias: Tensor | None, *, fan_in: int, identity: bool, std: float, spread: float = 0.0
) -> None:
    """Draw an adaptor's factors in place.

    One factor is uniform in ±√(6 / fan_in), the other is zero, so that the adaptor starts as the identity
    (FLoRAL's default). With `std` > 0 the other factor is normal with that standard deviation instead; without
    `identity` it is uniform too, and the bias is normal: a start for tests and for breaking symmetry. With
    `spread` > 0 biases are uniform in ± spread / √n, n the numbers that one element of `b`'s output sees: at 1 that is
    how PyTorch starts the bias of a layer with the weight `b`, which is where the authors' code leaves it.

    Args:
        a: first factor: what multiplies the input.
        b: second factor, shape (out, ...).
        bias: extra biases, or None.
        fan_in: number of inputs that one element of `a`'s output sees.
        identity: `FloralConfig.init_weights`.
        std: `FloralConfig.init_std`.
        spread: `FloralConfig.init_bias`.
    """
    _uniform(a, fan_in)
    if std > 0:
        nn.init.normal_(b, std=std)
    elif identity:
        nn.init.zeros_(b)
    else:
        _uniform(b, b[0].numel())
    if bias is not None:
        if spread > 0:
            bound = spread / sqrt(b[0, 0].numel())
            nn.init.uniform_(bias, -bound, bound)
        elif identity or std > 0:
            nn.init.zeros_(bias)
        else:
            nn.init.normal_(bias, std=0.1)


def _uniform(tensor: Tensor, fan_in: int) -> None:
    bound = sqrt(6 / fan_in)
    nn.init.uniform_(tensor, -bound, bound)
