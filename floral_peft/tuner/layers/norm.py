"""Normalisation layers: every adaptor adds a scale γ_c and, where the layer has one, a shift β_c of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from typing_extensions import override

from floral_peft.tuner.compute import per_example
from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.layers.base import FloralLayer
from floral_peft.tuner.router import Router


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer with a scale per channel: torch's own, or one of transformers'."""
    known = isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    weight = getattr(module, "weight", None)
    return (known or named) and isinstance(weight, Tensor) and not isinstance(module, nn.modules.lazy.LazyModuleMixin)


class Norm(FloralLayer):
    """`base(x) + s · Σ_c π_c (γ_c x̂ + β_c)`, x̂ the normalised input: the layer with scale γ + Σ and shift β + Σ.

    The parameters are `floral_weight` (C, *shape of the scale) and `floral_bias` (C, *shape of the shift).
    """

    adapter_layer_names: tuple[str, ...] = (
        "floral_weight",
        "floral_bias",
        "floral_shared_weight",
        "floral_shared_bias",
    )

    floral_weight: nn.ParameterDict
    floral_bias: nn.ParameterDict
    floral_shared_weight: nn.ParameterDict
    floral_shared_bias: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, router: Router, name: str) -> None:
        super().__init__(base_layer, router, name)
        self.in_features = self.out_features = self.get_base_layer().weight.numel()

    @override
    def add_adaptors(self, adapter_name: str, config: FloralConfig, rank: int | None) -> None:
        base = self.get_base_layer()
        for name in ("weight", "bias"):
            value = getattr(base, name, None)
            if value is None or (name == "bias" and not config.adapt_bias):
                continue
            for prefix, count in (("floral", config.num_adaptors), ("floral_shared", int(config.shared_r > 0))):
                if count:
                    start = torch.zeros(count, *value.shape)
                    if not config.init_weights:
                        nn.init.normal_(start, std=0.1)
                    getattr(self, f"{prefix}_{name}")[adapter_name] = nn.Parameter(start)

    @override
    def parameter_deltas(self, adapter_name: str, mixture: Tensor) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in self._mixed(adapter_name, mixture).items()}

    def tables(self, adapter_name: str) -> dict[str, Tensor]:
        """The adaptors' scales and shifts, by the base layer's names for them: (C, *shape)."""
        tables = {"weight": self.floral_weight, "bias": self.floral_bias}
        return {name: table[adapter_name] for name, table in tables.items() if adapter_name in table}

    def set_tables(self, adapter_name: str, tables: dict[str, Tensor]) -> None:
        """Make `tables` give these, in place."""
        for name, table in tables.items():
            getattr(self, f"floral_{name}")[adapter_name].copy_(table)

    def _mixed(self, adapter_name: str, mixture: Tensor) -> dict[str, Tensor]:
        """s·(Σ_c π_c γ_c + shared), and the same of β, for mixtures (n, C): (n, *shape)."""
        mixed = {}
        for name, table in self.tables(adapter_name).items():
            value = torch.tensordot(mixture.to(table), table, dims=1)
            shared = getattr(self, f"floral_shared_{name}")
            if adapter_name in shared:
                value = value + shared[adapter_name]
            mixed[name] = value * self.scaling[adapter_name]
        return mixed

    @override
    def run(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return _call(self.get_base_layer(), parameters, x)

    @override
    def _may_run_base(self) -> bool:
        """Any norm runs with another scale and shift, whatever its class."""
        return True

    @override
    def costs(self, x: Tensor, adapter_name: str) -> tuple[float, float]:
        return 1.0, 0.0

    @override
    def stacked(self, x: Tensor, result: Tensor, adapter_name: str, mixture: Tensor) -> Tensor:
        mixed = {
            name: per_example(value.flatten(1), len(x), self.name).view(-1, *value.shape[1:])
            for name, value in self._mixed(adapter_name, mixture).items()
        }
        if "weight" in mixed:
            result = result + self.normalized(x) * self._view(mixed["weight"], result)
        if "bias" in mixed:
            result = result + self._view(mixed["bias"], result)
        return result

    def normalized(self, x: Tensor) -> Tensor:
        """x̂: the layer is affine in its scale, so x̂ is what a scale of one adds to a scale of zero.

        (Not simply the layer with a scale of one: some of transformers' norms multiply by 1 + weight.)
        """
        base = self.get_base_layer()
        if isinstance(base, _NormBase):
            # by function: the layer itself would update its running statistics a second time
            batch = base.training or base.running_mean is None
            mean, var = (None, None) if batch else (base.running_mean, base.running_var)
            if isinstance(base, _InstanceNorm):
                return F.instance_norm(x, mean, var, use_input_stats=batch, eps=base.eps)
            return F.batch_norm(x, mean, var, training=batch, eps=base.eps)
        parameters: dict[str, Any] = {name: torch.zeros_like(value) for name, value in base.named_parameters()}
        zero = _call(base, parameters, x)
        return _call(base, parameters | {"weight": torch.ones_like(base.weight)}, x) - zero

    def _view(self, values: Tensor, result: Tensor) -> Tensor:
        """(n, *shape of the scale) against (n, ...): channels come second in batch, instance and group norm."""
        base = self.get_base_layer()
        if isinstance(base, (_NormBase, nn.GroupNorm)):
            return values.view(len(values), -1, *[1] * (result.dim() - 2))
        return values.view(len(values), *[1] * (result.dim() - values.dim()), *values.shape[1:])


def _call(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """A module's forward with other parameters.

    FSDP hides a module's parameters behind plain attributes of the same names while it runs, which `functional_call`
    would leave in place.
    """
    if torch.compiler.is_compiling():
        return functional_call(module, parameters, (x,))
    hidden = {name: module.__dict__.pop(name) for name in parameters if name in module.__dict__}
    try:
        return functional_call(module, parameters, (x,))
    finally:
        module.__dict__.update(hidden)
