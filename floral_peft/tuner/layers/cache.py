"""Merged parameters are worth keeping while nothing they were made of changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MergeCache:
    """One layer's merged parameters, for evaluation: made once, made anew when a source has changed.

    A source has changed when it is another tensor, lies elsewhere, or was written to in place. (Writes through
    `.data`, which torch does not count, are not seen until the model's `train` or `eval` is called.)
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._sources: list[tuple[Tensor, int, int]] = []
        self._settings: tuple[Any, ...] = ()
        self._value: dict[str, Tensor] | None = None
        self._saved = 0.0

    @staticmethod
    def can_watch(sources: Sequence[Tensor]) -> bool:
        """Whether a change of these would be seen; not so with stand-ins of functional calls or sharding."""
        return not torch._C._are_functorch_transforms_active() and all(
            (type(source) is nn.Parameter or not source.requires_grad) and not source.is_inference()
            for source in sources
        )

    def get(
        self,
        sources: Sequence[Tensor],
        settings: tuple[Any, ...],
        saving: float,
        cost: float,
        make: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor] | None:
        """The merged parameters, or None as long as making them has not paid.

        Like renting skis until they would have been cheaper to buy: the cost is at most twice that of knowing from
        the start for how many calls the sources stay.

        Args:
            sources: all tensors that the merged parameters depend on.
            settings: whatever else they depend on, to be compared.
            saving: operations that one call saves with them.
            cost: operations that making them takes.
            make: makes them.
        """
        current = [(source, source._version, source.data_ptr()) for source in sources]
        if settings != self._settings or not _same(current, self._sources):
            self.clear()
            self._sources, self._settings = current, settings
        if self._value is None:
            self._saved += saving
            if self._saved >= cost:
                self._value = make()
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> MergeCache:
        return MergeCache()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return MergeCache, ()


def _same(one: Sequence[tuple[Tensor, int, int]], other: Sequence[tuple[Tensor, int, int]]) -> bool:
    return len(one) == len(other) and all(
        a is b and version == before and pointer == there
        for (a, version, pointer), (b, before, there) in zip(one, other, strict=True)
    )
