"""Sums of tensors whose bits depend on what is added, not on the order nor on the process that added it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


#: Terms are sorted into classes of this many binary orders of magnitude.
_WIDTH = 8
#: Smaller terms count as this class's: its grid must stay a normal float64.
_LOWEST = -110
#: Terms of up to so many elements wait until there are so many of them: added together they cost a fifth.
_SMALL = 2**13
_TOGETHER = 32


class ExactSum:
    """The running sum Σ weightᵢ · valueᵢ of tensors of one shape, in float64.

    Float addition rounds, so a plain sum depends on the order. Here a term is first rounded to a grid that depends on
    its own largest magnitude only, and each grid has an accumulator of its own, wide enough that adding never rounds
    (a streaming form of the reproducible summation of Demmel and Nguyen, ARITH 2013). A term keeps at least
    52 − 8 − ⌈log₂ terms⌉ bits below its largest magnitude: more than float32 has, for cohorts of up to a million.

    Args:
        like: A tensor of the shape and on the device of the terms. Devices without float64 sum on the CPU.
        terms: Most terms that may be added, over all processes.

    Attributes:
        waits: Whether terms are so small that several wait and are added together.
    """

    def __init__(self, like: Tensor, terms: int) -> None:
        self.shape = like.shape
        self.device = torch.device("cpu") if like.device.type == "mps" else like.device
        self._headroom = max(1, terms.bit_length())
        self._sums: dict[int, Tensor] = {}  # class → the sum of its terms, multiples of its grid
        self.waits = like.numel() <= _SMALL
        self._waiting: list[tuple[int, Tensor, Tensor | int]] = []

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
            value: The tensor; all finite. It must stay as it is.
            weight: An int, or a float64 tensor that broadcasts against the value (of as many dimensions, with `part`);
                of one shape in all terms of a sum.
            bound: At least the largest magnitude in weight · value; it must follow from this term alone. Finite.
            scratch: Memory for the product: float64, 1-D, at least as many elements as the value.
            part: An axis and the indices along it, int64, outside which weight · value is 0: only there it is added.
                The bits are the same without.
        """
        if bound == 0.0:
            return
        order = math.frexp(bound)[1]  # bound < 2^order
        chosen = max(_LOWEST, -(-order // _WIDTH))
        if self.waits:
            self._waiting.append((chosen, value, weight))
            if len(self._waiting) == _TOGETHER:
                self._add_waiting()
            return
        total, rounder = self._sum(chosen), self._rounder(chosen)
        if part is not None:
            value = value.index_select(part[0], part[1].to(value.device))
            weight = weight.index_select(part[0], part[1].to(weight.device)) if isinstance(weight, Tensor) else weight
        product = total.new_empty(value.shape) if scratch is None else scratch[: value.numel()].view(value.shape)
        product.copy_(value).mul_(weight).add_(rounder).sub_(rounder)
        if part is None:
            total.add_(product)
        else:
            total.index_add_(part[0], part[1].to(total.device), product)

    def classes(self) -> list[int]:
        """The classes of magnitude that hold something here."""
        self._add_waiting()
        return sorted(self._sums)

    def parts(self, classes: list[int]) -> Iterator[Tensor]:
        """The accumulators of some classes, to be summed over processes in place: exact, like all the rest."""
        self._add_waiting()
        for chosen in classes:
            yield self._sum(chosen)

    def result(self) -> Tensor:
        """The sum, float64."""
        total = self._zeros()
        for chosen in self.classes():
            total += self._sums[chosen]
        return total

    def _sum(self, chosen: int) -> Tensor:
        """The accumulator of a class."""
        if chosen not in self._sums:
            self._sums[chosen] = self._zeros()
        return self._sums[chosen]

    def _rounder(self, chosen: int) -> float:
        """What is added to the terms of a class, and taken away again, so that they are on its grid.

        All terms are below 2^(8·class), so all sums of them are multiples of the grid below 2^53 times it. Adding
        1.5·2^52 grids rounds to the grid, whatever the sum holds; taking them away is exact.
        """
        return 1.5 * 2.0**52 * math.ldexp(1.0, _WIDTH * chosen + self._headroom - 52)

    def _add_waiting(self) -> None:
        """Add the terms that wait, class by class: once they are on the grid, their sum has the same bits anyhow."""
        waiting, self._waiting = self._waiting, []
        for chosen in {chosen for chosen, _, _ in waiting}:
            total, rounder = self._sum(chosen), self._rounder(chosen)
            terms = [(value, weight) for own, value, weight in waiting if own == chosen]
            products = torch.stack([value for value, _ in terms]).to(total.device, torch.float64)
            products.mul_(_stacked([weight for _, weight in terms], products)).add_(rounder).sub_(rounder)
            total.add_(products.sum(dim=0))

    def _zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float64, device=self.device)


def _stacked(weights: Sequence[Tensor | int], like: Tensor) -> Tensor:
    """Weights of several terms, to be multiplied with them, (terms, ...)."""
    given = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(given) < len(weights):
        found = torch.tensor(weights, dtype=torch.float64)
    else:
        found = torch.stack(given)
    first, *others = found.shape
    return found.to(like).view(first, *[1] * (like.dim() - found.dim()), *others)
