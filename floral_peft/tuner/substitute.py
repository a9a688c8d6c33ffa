"""Calling what uses a model while other tensors stand in for its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class Substitute:
    """Calls functions within which a model has other tensors, as torch.func wants them.

    Args:
        model: The model. It is not changed.
        tie_weights: Whether a tensor also stands in under the other names that its own has in the model. To find them
            takes a walk over the model at each call.
    """

    def __init__(self, model: nn.Module, tie_weights: bool = True) -> None:
        self._scope = _Scope(model)
        self._tie_weights = tie_weights

    def __call__(self, tensors: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
        """What a function returns while these tensors stand in for those of their names."""
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self._scope, named, (function,), tie_weights=self._tie_weights)


class _Scope(nn.Module):
    """A module for `functional_call` that calls what it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()
