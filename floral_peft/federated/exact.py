"""Sums of tensors whose bits depend on what is added, not on the order nor on the process that added it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


#: Terms are sorted into classes of this many binary orders of magnitude.
_WIDTH = 8
#: Smaller terms count as this class's: its grid must stay a normal float64.
_LOWEST = -110


class ExactSum:
    """The running sum Σ weightᵢ · valueᵢ of tensors of one shape, in float64.

    Float addition rounds, so a plain sum depends on the order. Here a term is first rounded to a grid that depends on
    its own largest magnitude only, and each grid has an accumulator of its own, wide enough that adding never rounds
    (a streaming form of the reproducible summation of Demmel and Nguyen, ARITH 2013). A term keeps at least
    52 − 8 − ⌈log₂ terms⌉ bits below its largest magnitude: more than float32 has, for cohorts of up to a million.

    Args:
        like: A tensor of the shape and on the device of the terms. Devices without float64 sum on the CPU.
        terms: Most terms that may be added, over all processes.
    """

    def __init__(self, like: Tensor, terms: int) -> None:
        self.shape = like.shape
        self.device = torch.device("cpu") if like.device.type == "mps" else like.device
        self._headroom = max(1, terms.bit_length())
        self._sums: dict[int, Tensor] = {}  # class → the sum of its terms, multiples of its grid

    def add(
        self,
        value: Tensor,
        weight: Tensor | int,
        bound: float,
        scratch: Tensor | None = None,
        part: tuple[int, Tensor] | None = None,
    ) -> None:
        """Add weight · value.

        Args:
            value: The tensor; all finite.
            weight: An int, or a float64 tensor of as many dimensions that broadcasts against the value.
            bound: At least the largest magnitude in weight · value; it must follow from this term alone. Finite.
            scratch: Memory for the product: float64, 1-D, at least as many elements as the value.
            part: An axis and the indices along it, int64, outside which weight · value is 0: only there it is added.
                The bits are the same without.
        """
        if bound == 0.0:
            return
        order = math.frexp(bound)[1]  # bound < 2^order
        chosen = max(_LOWEST, -(-order // _WIDTH))
        if chosen not in self._sums:
            self._sums[chosen] = self._zeros()
        # All terms are below 2^(8·class), so all sums of them are multiples of the grid below 2^53 times it.
        grid = math.ldexp(1.0, _WIDTH * chosen + self._headroom - 52)
        # Adding 1.5·2^52 grids rounds to the grid, whatever the sum holds; taking them away is exact.
        rounder = 1.5 * 2.0**52 * grid
        if part is not None:
            value = value.index_select(part[0], part[1].to(value.device))
            weight = weight.index_select(part[0], part[1].to(weight.device)) if isinstance(weight, Tensor) else weight
        total = self._sums[chosen]
        product = total.new_empty(value.shape) if scratch is None else scratch[: value.numel()].view(value.shape)
        product.copy_(value).mul_(weight).add_(rounder).sub_(rounder)
        if part is None:
            total.add_(product)
        else:
            total.index_add_(part[0], part[1].to(total.device), product)

    def classes(self) -> list[int]:
        """The classes of magnitude that hold something here."""
        return sorted(self._sums)

    def parts(self, classes: list[int]) -> Iterator[Tensor]:
        """The accumulators of some classes, to be summed over processes in place: exact, like all the rest."""
        for chosen in classes:
            yield self._sums.setdefault(chosen, self._zeros())

    def result(self) -> Tensor:
        """The sum, float64."""
        total = self._zeros()
        for chosen in self.classes():
            total += self._sums[chosen]
        return total

    def _zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float64, device=self.device)
