"""Layers whose adaptors are pairs of low-rank factors: `base(x) + s · Σ_c π_c (B_c A_c x + β_c)`."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from typing_extensions import override

from floral_peft.tuner.compute import Factors
from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.layers.base import FloralLayer
from floral_peft.tuner.rank import init_factors, rank_of_budget
from floral_peft.tuner.router import Router


FusedInputs = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor]


class Geometry(NamedTuple):
    """Shape of a layer's factors, but for the rank: A is (C, r, *inputs), B is (outputs, C, r, *kernel).

    `bias` is the length of the layer's bias. `table`: A is looked up, not multiplied, and is what starts at zero.
    """

    inputs: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...] = ()
    bias: int = 0
    table: bool = False

    @property
    def full_rank(self) -> int:
        """The largest rank that the product of the factors can have, as matrices."""
        return min(prod(self.inputs), self.outputs * prod(self.kernel))

    @property
    def numel_per_rank(self) -> int:
        """Parameters that one more unit of rank costs one adaptor."""
        return prod(self.inputs) + self.outputs * prod(self.kernel)


class FactoredLayer(FloralLayer):
    """A layer with C pairs of factors per adapter name, and a shared pair if the config asks for one."""

    adapter_layer_names: tuple[str, ...] = (
        "floral_A",
        "floral_B",
        "floral_bias",
        "floral_shared_A",
        "floral_shared_B",
        "floral_shared_bias",
    )
    other_param_names: tuple[str, ...] = (*FloralLayer.other_param_names, "r")

    floral_A: nn.ParameterDict
    floral_B: nn.ParameterDict
    floral_bias: nn.ParameterDict
    floral_shared_A: nn.ParameterDict
    floral_shared_B: nn.ParameterDict
    floral_shared_bias: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, router: Router, name: str) -> None:
        super().__init__(base_layer, router, name)
        self.r: dict[str, int] = {}
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = self.sizes()

    def sizes(self) -> tuple[int, int]:
        """The layer's features or channels, in and out."""
        features_in, features_out = _get_in_out_features(self.get_base_layer())
        if features_in is None or features_out is None:
            raise TypeError(f"Layer {self.name}: a {type(self.get_base_layer()).__name__} does not say its sizes.")
        return features_in, features_out

    # What a kind of layer says

    @abstractmethod
    def geometry(self, config: FloralConfig) -> Geometry:
        """Shape of the factors."""

    @abstractmethod
    def weight_numel(self) -> int:
        """Number of elements of the weight; not read off the weight itself, which may be packed."""

    @abstractmethod
    def add(self, x: Tensor, result: Tensor, factors: Factors, mixture: Tensor) -> Tensor:
        """The result with what the adaptors add to it, for π of shape (n, C)."""

    @abstractmethod
    def delta_weight(self, factors: Factors, mixture: Tensor) -> Tensor:
        """What the adaptors add to the weight, for π of shape (1, C)."""

    # Adapters

    @override
    def add_adaptors(self, adapter_name: str, config: FloralConfig, rank: int | None) -> None:
        geometry = self.geometry(config)
        self.r[adapter_name] = r = self.rank_by(config) if rank is None else rank
        has_bias = config.adapt_bias and geometry.bias > 0
        self._create("floral", adapter_name, config.num_adaptors, r, geometry, has_bias)
        if config.shared_r:
            self._create("floral_shared", adapter_name, 1, config.shared_r, geometry, has_bias)
        self._reset(adapter_name, config, geometry)

    def rank_by(self, config: FloralConfig) -> int:
        """The rank that a config's `r` or `budget` gives the layer."""
        if config.budget is None:
            return config.r
        numel_per_rank = self.geometry(config).numel_per_rank
        return rank_of_budget(config.budget, self.weight_numel(), numel_per_rank, config.min_rank)

    def _create(self, prefix: str, adapter_name: str, c: int, r: int, geometry: Geometry, bias: bool) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            "A": (c, r, *geometry.inputs),
            "B": (geometry.outputs, c, r, *geometry.kernel),
        }
        if bias:
            shapes["bias"] = (c, geometry.bias)
        for factor, shape in shapes.items():
            getattr(self, f"{prefix}_{factor}")[adapter_name] = nn.Parameter(torch.empty(shape))

    def _reset(self, adapter_name: str, config: FloralConfig, geometry: Geometry) -> None:
        """Draw the factors. `init_std` and `init_bias` are for adaptors that are to differ, not for the shared one."""
        factors = self.factors(adapter_name)
        pairs = [(factors.a, factors.b, factors.bias, config.init_std, config.init_bias)]
        if factors.shared_a is not None and factors.shared_b is not None:
            pairs.append((factors.shared_a, factors.shared_b, factors.shared_bias, 0.0, 0.0))
        for a, b, bias, std, spread in pairs:
            drawn, zero = (b, a) if geometry.table else (a, b)
            # a row of B sees one adaptor's r numbers, a row of A the layer's inputs
            fan_in = a.shape[1] if geometry.table else prod(geometry.inputs)
            init_factors(drawn, zero, bias, fan_in=fan_in, identity=config.init_weights, std=std, spread=spread)

    def factors(self, adapter_name: str) -> Factors:
        """The adapter's adaptors."""
        return Factors(
            _held(self.floral_A, adapter_name),
            _held(self.floral_B, adapter_name),
            _get(self.floral_bias, adapter_name),
            _get(self.floral_shared_A, adapter_name),
            _get(self.floral_shared_B, adapter_name),
            _get(self.floral_shared_bias, adapter_name),
            self.scaling[adapter_name],
        )

    def with_rank(self, adapter_name: str, config: FloralConfig, rank: int) -> tuple[Tensor, Tensor]:
        """The adaptors' factors A and B with terms added up to a rank, which contribute nothing yet."""
        geometry, old = self.geometry(config), self.factors(adapter_name)
        a = torch.zeros(len(old.a), rank, *old.a.shape[2:])
        b = torch.zeros(*old.b.shape[:2], rank, *old.b.shape[3:])
        drawn, zero = (b, a) if geometry.table else (a, b)
        fan_in = rank if geometry.table else prod(geometry.inputs)
        init_factors(drawn, zero, None, fan_in=fan_in, identity=True, std=0.0)
        a, b = a.to(old.a), b.to(old.b)
        a[:, : old.a.shape[1]] = old.a
        b[:, :, : old.b.shape[2]] = old.b
        return a, b

    def set_factors(self, adapter_name: str, a: Tensor, b: Tensor) -> None:
        """Replace the adaptors' factors by A (C, r, in...) and B (out, C, r, kernel...) of any rank r.

        Where the rank changes, these become new parameters, of which an optimiser knows nothing yet.
        """
        for table, value in ((self.floral_A, a), (self.floral_B, b)):
            old = table[adapter_name]
            if old.shape == value.shape:
                old.detach().copy_(value)
            else:
                table[adapter_name] = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
        self.r[adapter_name] = a.shape[1]
        self._cache.clear()

    def fused_inputs(self, adapter_name: str, mixture: Tensor, x: Tensor) -> FusedInputs | None:
        """What a fused operation takes after the layer's input: W, b, A, B, β and s·π.

        None where there is a shared adaptor, which the fused operations do not know.
        """
        if adapter_name in self.floral_shared_A:
            return None
        base: Any = self.base_layer
        return (
            base.weight,
            base.bias,
            _held(self.floral_A, adapter_name),
            _held(self.floral_B, adapter_name),
            _get(self.floral_bias, adapter_name),
            self.router.weights(mixture, self.scaling[adapter_name], x),
        )

    @override
    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for name in self.active_adapters:
            if self.holds(name):
                factors = self.factors(name)
                pairs.append((factors.a, factors.b))
                if factors.shared_a is not None and factors.shared_b is not None:
                    pairs.append((factors.shared_a, factors.shared_b))
        return pairs

    # Forward

    @override
    def stacked(self, x: Tensor, result: Tensor, adapter_name: str, mixture: Tensor) -> Tensor:
        return self.add(x, result, self.factors(adapter_name), mixture)

    @override
    def parameter_deltas(self, adapter_name: str, mixture: Tensor) -> dict[str, Tensor]:
        factors = self.factors(adapter_name)
        mixture = mixture.to(factors.a.device)
        deltas = {"weight": self.delta_weight(factors, mixture)}
        bias = factors.mixed_bias(mixture)
        return deltas if bias is None else deltas | {"bias": bias[0]}


def _held(parameters: nn.ParameterDict, adapter_name: str) -> Tensor:
    found = parameters._parameters.get(adapter_name)  # the short way, but FSDP hides parameters behind attributes
    return parameters[adapter_name] if found is None else found


def _get(parameters: nn.ParameterDict, adapter_name: str) -> Tensor | None:
    return _held(parameters, adapter_name) if adapter_name in parameters else None
