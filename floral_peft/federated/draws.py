"""Random numbers for clients that train side by side: each draws from its own generators, as if it were alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class ClientGenerators:
    """One client's random generators, while other clients' draw in between.

    Args:
        seed: As given to `set_seed` for a client that trains alone.
        device: Where the model is.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._host = torch.Generator().manual_seed(seed)
        self.device = self._host if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
        self._seed = seed
        self._others: tuple[Any, Any] | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the global generators of Python, NumPy and PyTorch on the CPU are the client's."""
        if self._others is None:
            random.seed(self._seed)
            np.random.seed(self._seed)
        else:
            random.setstate(self._others[0])
            np.random.set_state(self._others[1])
        torch.set_rng_state(self._host.get_state())
        try:
            yield
        finally:
            self._others = random.getstate(), np.random.get_state()
            self._host.set_state(torch.get_rng_state())


class ClientDraws(TorchFunctionMode):
    """Within `torch.func.vmap` over clients, dropout and `torch.rand` and the like draw from each client's generator.

    Left to itself, vmap draws for all clients at once: what a client gets would depend on the others. Random functions
    that are not known here make vmap raise, as `randomness="error"` says.

    Args:
        client: A tensor that vmap splits over the clients, whatever is in it.
        generators: The clients' generators, in order.
    """

    def __init__(self, client: Tensor, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self._client = client
        self._generators = generators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        ours = _KNOWN.get(func)
        return func(*args, **(kwargs or {})) if ours is None else ours(self, *args, **(kwargs or {}))

    def draw(self, shape: Sequence[int], dtype: torch.dtype | None, fill: Callable[..., Tensor]) -> Tensor:
        """Each client's draw of this shape.

        Args:
            shape: One client's.
            dtype: The default one if None.
            fill: Fills a tensor in place from a `generator`, as `Tensor.uniform_` does.
        """
        drawn: Tensor = _Draw.apply(self._client, self._generators, tuple(shape), dtype, fill)
        return drawn


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(
        client: Tensor, generators: Sequence[torch.Generator], shape: Any, dtype: torch.dtype | None, fill: Any
    ) -> Tensor:
        raise RuntimeError("ClientDraws is for torch.func.vmap over clients")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        client: Tensor,
        generators: Sequence[torch.Generator],
        shape: Any,
        dtype: Any,
        fill: Any,
    ) -> tuple[Tensor, int]:
        drawn = torch.empty(len(generators), *shape, dtype=dtype, device=client.device)
        for row, generator in zip(drawn, generators, strict=True):
            fill(row, generator=generator)
        return drawn, 0


def _dropout(
    draws: ClientDraws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _masked(draws, input, p, training, input.shape)


def _channel_dropout(
    draws: ClientDraws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _masked(draws, input, p, training, [*input.shape[:2], *[1] * (input.dim() - 2)])


def _masked(draws: ClientDraws, input: Tensor, p: float, training: bool, shape: Sequence[int]) -> Tensor:
    if not training or p == 0:
        return input
    kept = draws.draw(shape, input.dtype, lambda row, generator: row.bernoulli_(1 - p, generator=generator))
    return input * (kept / (1 - p) if p < 1 else kept)


def _filled(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of `torch.rand` or `torch.randn`."""

    def draw(draws: ClientDraws, *size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = size if all(isinstance(length, int) for length in size) else size[0]
        return draws.draw(shape, dtype, fill)

    return draw


def _filled_like(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of `torch.rand_like` or `torch.randn_like`."""

    def draw(draws: ClientDraws, input: Tensor, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return draws.draw(input.shape, dtype or input.dtype, fill)

    return draw


_KNOWN: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _dropout,
    F.dropout2d: _channel_dropout,
    F.dropout3d: _channel_dropout,
    torch.rand: _filled(Tensor.uniform_),
    torch.randn: _filled(Tensor.normal_),
    torch.rand_like: _filled_like(Tensor.uniform_),
    torch.randn_like: _filled_like(Tensor.normal_),
}
