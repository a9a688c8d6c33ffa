"""Pure models: what a loss is where every layer uses one adaptor alone, for each of the C adaptors.

A router chooses by these losses. They are made without gradients, and from slices: the pure model of adaptor c is a
model with that one adaptor, whose weight is 1, not a mixture of C of which all but one count nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap

from floral_peft.tuner.layers import BatchNorm, FloralLayer, ReparametrizedBatchNorm
from floral_peft.tuner.layers.base import has_hooks
from floral_peft.tuner.layers.conv import ConvLayer
from floral_peft.tuner.layers.factored import FactoredLayer
from floral_peft.tuner.roles import parameter_roles
from floral_peft.tuner.router import Router
from floral_peft.tuner.substitute import Substitute


Batch = TypeVar("Batch")

#: Logit, at temperature 1, of what a softmax must not choose: its weight is 0 exactly.
_NEVER = -1e4


class PureModels:
    """A model under each of its adaptors alone: one with FLORAL layers, or an [`Ensemble`].

    Where it pays, the C models run as one batched computation (`torch.func.vmap`), in which the layers before the
    first adaptor, and the base's part in the first adapted layer, are computed once for all. They run one after the
    other with merged weights where convolutions are adapted and the device is a CPU (each adaptor would be a group of
    a grouped convolution), where a layer is quantised or has hooks, and once anything has come up that vmap cannot do
    or does badly, such as control flow that depends on the data, or fused attention.

    Args:
        model: The model. It is not changed. Where it gets other layers, or other adapters become active, this must be
            made anew; not where adaptors are removed or their rank changes.

    Raises:
        ValueError: The model has no router, or several active adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        roles = parameter_roles(model)
        names = [name for name, role in roles.items() if role.kind == "router"]
        if len(names) != 1:
            raise ValueError(
                f"the model has {len(names)} active FLORAL adapters, and pure models are those of one: choose it with "
                "model.set_adapter."
            )
        self._with = Substitute(model, tie_weights=False)
        self._name = names[0]
        self._adapter = names[0].rsplit(".", 1)[-1]
        # Found once: a walk over a small model takes as long as a forward pass.
        self._modules = list(model.modules())
        self._router = next(module for module in self._modules if isinstance(module, Router))
        factored = [layer for layer in self._modules if isinstance(layer, FactoredLayer)]
        self._factored = [layer for layer in factored if layer.holds(self._adapter)]
        places = [(name.rsplit(".", 1)[0], role.axis) for name, role in roles.items() if role.axis is not None]
        for prefix, module in model.named_modules():
            if isinstance(module, (BatchNorm, ReparametrizedBatchNorm)) and module.holds(self._adapter):
                places += [(f"{prefix}.floral_mean", 0), (f"{prefix}.floral_var", 0)]
        self._places: list[tuple[str, Any, int]] = [
            (f"{place}.{self._adapter}", model.get_submodule(place), axis) for place, axis in places
        ]
        self._together = _can_batch(model)

    def losses(self, loss: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> list[Tensor]:
        """f_c of every adaptor c, batch by batch, without gradients and in evaluation mode.

        Args:
            loss: Runs the model on a batch. Returns the batch's loss, a scalar, or those of its examples, or any other
                tensor.
            batches: The batches; they are held in memory together.

        Returns:
            For each batch what `loss` returned under each adaptor, stacked: (C, ...).
        """
        held = list(batches)
        tensors = self._tensors()
        with torch.no_grad(), _evaluating(self._modules), self._first_client():
            failure: Exception | None = None
            if self._together:
                try:
                    with self._stacked(self._factored), _lanes_refused():
                        return [vmap(lambda part: self._within(part, loss, batch))(tensors) for batch in held]  # noqa: B023
                except (RuntimeError, UserWarning) as error:
                    failure = error
            count = len(next(iter(tensors.values())))
            parts = [{name: tensor[c] for name, tensor in tensors.items()} for c in range(count)]
            # Convolutions are merged, once for all batches. Of the others, whether it pays would depend on how many
            # batches there are, and so would the bits.
            others = [layer for layer in self._factored if not isinstance(layer, ConvLayer)]
            with self._stacked([layer for layer in others if layer.compute[self._adapter] == "auto"]):
                rows = [[self._within(part, loss, batch) for batch in held] for part in parts]
            if failure is not None and not isinstance(failure, torch.OutOfMemoryError):
                self._together = False  # it is vmap that cannot do it: whatever else is wrong is wrong here, too
            return [torch.stack(losses) for losses in zip(*rows, strict=True)]

    def _tensors(self) -> dict[str, Tensor]:
        """What differs between the pure models, stacked over them: name → (C, ...); views of the model's tensors."""
        tensors = {name: _slices(held[self._adapter].detach(), axis) for name, held, axis in self._places}
        table = self._router.logits[self._adapter].detach()
        rows, layers, count = table.shape
        if tensors:  # one adaptor each: whatever its logit, its weight is 1
            logits = table.new_zeros(count, 1, 1, 1)
        else:  # an Ensemble runs the models that have a weight
            never = _NEVER * self._router.settings[self._adapter].temperature
            logits = table.new_full((count, count), never).fill_diagonal_(0.0).view(count, 1, 1, count)
        return tensors | {self._name: logits.expand(-1, rows, layers, -1)}

    def _within(self, tensors: Mapping[str, Tensor], loss: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        result: Tensor = self._with(tensors, lambda: loss(batch))
        return result

    @contextmanager
    def _stacked(self, layers: Sequence[FactoredLayer]) -> Iterator[None]:
        """Within, these layers merge no weights. Computed together they cannot: the base's part would differ, too."""
        before = [layer.compute[self._adapter] for layer in layers]
        for layer in layers:
            layer.compute[self._adapter] = "stacked"
        try:
            yield
        finally:
            for layer, asked in zip(layers, before, strict=True):
                layer.compute[self._adapter] = asked

    @contextmanager
    def _first_client(self) -> Iterator[None]:
        """Whose router it is does not matter, but there must be one for a batch of any size."""
        before = self._router.client
        self._router.select(before.new_zeros(1))
        try:
            yield
        finally:
            self._router.select(before)


def pure_losses(model: nn.Module, loss: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> list[Tensor]:
    """The loss of each batch under each adaptor alone, (C, ...): see [`PureModels.losses`]."""
    return PureModels(model).losses(loss, batches)


def _slices(tensor: Tensor, axis: int) -> Tensor:
    """The C slices along an axis, which stays, with length 1: (C, ..., 1, ...)."""
    return tensor.unsqueeze(axis + 1).movedim(axis, 0)


def _can_batch(model: nn.Module) -> bool:
    layers = [layer for layer in model.modules() if isinstance(layer, FloralLayer)]
    adapted = [layer for layer in layers if any(layer.holds(name) for name in layer.active_adapters)]
    for layer in adapted:
        base = layer.get_base_layer()
        if layer.quantization_backend is not None or has_hooks(base):
            return False
        if isinstance(layer, ConvLayer) and base.weight.device.type == "cpu":
            return False
    return bool(adapted)  # an Ensemble has none: each pure model is one of its members, and they share nothing


@contextmanager
def _lanes_refused() -> Iterator[None]:
    """Within, an operation that vmap does lane by lane is an error, a UserWarning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop", UserWarning)
        yield


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in the mode in which it was."""
    training = [module for module in modules if module.training]
    if training:
        modules[0].eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
