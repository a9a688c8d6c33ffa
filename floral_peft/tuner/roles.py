"""What each parameter of a model is for: all that the federated half needs to know of the tuner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from floral_peft.tuner.layers import BatchNorm, FloralLayer, ReparametrizedBatchNorm
from floral_peft.tuner.router import Router


@dataclass(frozen=True)
class Role:
    """A parameter's place in the method.

    Attributes:
        kind: `"adaptor"` holds all C adaptors' values, `"shared_adaptor"` those of the one that every client uses,
            `"router"` a client's logits; everything else is `"base"`.
        axis: for an adaptor, the axis of length C.
        slot: for an adaptor, which of the router's L rows weighs it.
        factor: for both kinds of adaptor, its part: a low-rank factor A or B, a norm's scale, or a bias; or a batch
            norm's running mean or variance.
        layer: for both kinds of adaptor, the layer's name, the same for all its factors.
    """

    kind: Literal["base", "shared_adaptor", "adaptor", "router"]
    axis: int | None = None
    slot: int = 0
    factor: Literal["A", "B", "weight", "bias", "mean", "var"] | None = None
    layer: str | None = None


_FACTORS: tuple[Literal["A", "B", "weight", "bias"], ...] = ("A", "B", "weight", "bias")
_STATISTICS: tuple[Literal["mean", "var"], ...] = ("mean", "var")


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every name in `model.named_parameters()`.

    Only the active adapter's parameters are adaptors or routers; a model without FLORAL layers is all base. Whether
    a parameter trains is said by its `requires_grad`, as ever.
    """
    special: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, FloralLayer):
            for adapter_name in module.active_adapters:
                slot = module.slot.get(adapter_name, 0)
                for factor in _FACTORS:
                    adaptor = Role("adaptor", int(factor == "B"), slot, factor, prefix)
                    special[f"{dot}floral_{factor}.{adapter_name}"] = adaptor
                    shared = Role("shared_adaptor", None, slot, factor, prefix)
                    special[f"{dot}floral_shared_{factor}.{adapter_name}"] = shared
        elif isinstance(module, Router):
            for adapter_name in module.active_adapters:
                special[f"{dot}logits.{adapter_name}"] = Role("router")
    base = Role("base")
    return {name: special.get(name, base) for name, _ in model.named_parameters()}


def buffer_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every name in `model.named_buffers()`: of the active adapter's, adaptors' running statistics."""
    special: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, BatchNorm):
            for name in module.active_adapters:
                for factor in _STATISTICS:
                    role = Role("adaptor", 0, module.slot.get(name, 0), factor, prefix)
                    special[f"{prefix}.floral_{factor}.{name}"] = role
    base = Role("base")
    return {name: special.get(name, base) for name, _ in model.named_buffers()}


def private_buffers(model: nn.Module) -> list[str]:
    """Names, as in `model.named_buffers()`, of the statistics of a client's data that must stay with it.

    These are the running statistics, main and adaptors', of batch norms that were adapted with
    `adapt_norms="reparametrized"`.
    """
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ReparametrizedBatchNorm))
    return [name for name, _ in model.named_buffers() if name.startswith(layers)]
