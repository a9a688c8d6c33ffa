"""What all adapted layers have in common: their place in PEFT, merging, and the choice of a compute path."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from typing_extensions import override

from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.layers.cache import MergeCache
from floral_peft.tuner.router import Router, Selection


class FloralLayer(nn.Module, BaseTunerLayer):
    """A layer with C adaptors per adapter name, mixed by the client's π.

    A kind of layer says what one mixture adds to the base layer's parameters (`parameter_deltas`), how the layer runs
    with other parameters (`run`), and how the adaptors act on an input without touching them (`stacked`). The rest is
    here.
    """

    other_param_names: tuple[str, ...] = ("scaling", "slot", "compute")
    exact_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layer types whose forward is known, so that it may be run with other parameters."""

    router: Router
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, router: Router, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        # a plain reference: registered as a submodule of every layer, its table would be saved once per layer
        object.__setattr__(self, "router", router)
        self.scaling: dict[str, float] = {}
        self.slot: dict[str, int] = {}
        self.compute: dict[str, str] = {}
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.merged_adapters: list[str] = []
        self._merged_mixtures: dict[str, Tensor] = {}
        self._cache = MergeCache()

    if TYPE_CHECKING:

        def get_base_layer(self) -> Any:
            """The wrapped layer, of a kind that the subclass knows."""

    # What a kind of layer says

    @abstractmethod
    def add_adaptors(self, adapter_name: str, config: FloralConfig, rank: int | None) -> None:
        """Create and draw an adapter's parameters. `rank`: this layer's own, or None for what the config gives."""

    @abstractmethod
    def parameter_deltas(self, adapter_name: str, mixture: Tensor) -> dict[str, Tensor]:
        """What a single mixture π, of shape (1, C), adds to the base layer's parameters, by their names."""

    @abstractmethod
    def run(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The base layer's forward with these parameters in place of its own."""

    @abstractmethod
    def stacked(self, x: Tensor, result: Tensor, adapter_name: str, mixture: Tensor) -> Tensor:
        """The base layer's result with the adaptors' added, for mixtures π of shape (n, C)."""

    def fused(self, x: Tensor, adapter_name: str, mixture: Tensor) -> Tensor | None:
        """Base and adaptors as one operation, for π of shape (n, C), where the kind of layer has one that fits."""
        return None

    @abstractmethod
    def costs(self, x: Tensor, adapter_name: str) -> tuple[float, float]:
        """Multiplications of the stacked path beyond the base's own, and of making the merged parameters."""

    # Adapters

    def update_layer(
        self, adapter_name: str, config: FloralConfig, *, rank: int | None, scale: float, slot: int
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: its config.
            rank: this layer's own rank, or None for what the config's `r` or `budget` give.
            scale: s.
            slot: which of the router's L rows weighs this layer.
        """
        self.scaling[adapter_name] = scale
        self.slot[adapter_name] = slot
        self.compute[adapter_name] = config.compute
        self.add_adaptors(adapter_name, config, rank)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def holds(self, adapter_name: str) -> bool:
        """Whether the layer has adaptors of that adapter."""
        return adapter_name in self.slot

    def keep_adaptors(self, adapter_name: str, kept: Tensor) -> None:
        """Keep only some of an adapter's adaptors, as new parameters.

        Args:
            adapter_name: the adapter.
            kept: the adaptors' numbers, int64.
        """
        for attribute in self.adapter_layer_names:
            table = getattr(self, attribute)
            if adapter_name in table and "shared" not in attribute:
                old = table[adapter_name]
                axis = int(attribute == "floral_B")
                values = old.detach().index_select(axis, kept.to(old.device))
                table[adapter_name] = nn.Parameter(values, requires_grad=old.requires_grad)
        self._cache.clear()

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The active adapters' low-rank factors (A, B), if any: (C, r, in...) and (out, C, r, kernel...)."""
        return []

    # Forward

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        slots = self.slot
        names = [] if self.merged_adapters else [name for name in self.active_adapters if name in slots]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        mixtures = [self.router.mixture(name, slots[name]) for name in names]
        if not args and not kwargs and self._may_run_base():
            # in evaluation merged parameters may be kept, so they come first
            ways = (self._fused, self._merged) if torch.is_grad_enabled() else (self._merged, self._fused)
            for way in ways:
                result = way(x, names, mixtures)
                if result is not None:
                    return result
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name, mixture in zip(names, mixtures, strict=True):
            result = self.stacked(x, result, name, mixture.to(result.device))
        return result.to(dtype)

    def _fused(self, x: Tensor, names: list[str], mixtures: list[Tensor]) -> Tensor | None:
        return self.fused(x, names[0], mixtures[0]) if len(names) == 1 else None

    def _merged(self, x: Tensor, names: list[str], mixtures: list[Tensor]) -> Tensor | None:
        if any(mixture.shape[0] > 1 for mixture in mixtures):
            return None
        parameters = self._merged_parameters(x, names, mixtures)
        return None if parameters is None else self.run(x, parameters)

    def _may_run_base(self) -> bool:
        """Whether the base's forward may be done here: a plain layer of a known kind."""
        base: Any = self.base_layer
        if type(base) not in self.exact_types or has_hooks(base):
            return False  # these would be passed by, and may be what shards or offloads the layer
        for name, parameter in base._parameters.items():
            # by getattr: FSDP hides parameters behind attributes while it runs
            if parameter is not None and not _is_plain(getattr(base, name)):
                return False
        return True

    def _merged_parameters(self, x: Tensor, names: list[str], mixtures: list[Tensor]) -> dict[str, Tensor] | None:
        """The base's parameters with all mixtures added, or None where the stacked path is cheaper, or asked for."""

        def make() -> dict[str, Tensor]:
            return self._add_mixtures(names, mixtures)

        if not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            sources = self._sources(names)
            if self._cache.can_watch(sources):
                if any(self.compute[name] == "stacked" for name in names):
                    return None
                settings: tuple[Any, ...] = tuple(
                    (name, self.scaling[name], *self.router.settings[name].shape_of_pi) for name in names
                )
                settings += (torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type))
                forced = any(self.compute[name] == "merged" for name in names)
                stacked, merged = self._sum_of_costs(x, names)
                return self._cache.get(sources, settings, stacked, 0 if forced else merged, make)
        return make() if self.merges(x, *names) else None

    def merges(self, x: Tensor, *names: str) -> bool:
        """Whether a call merges: as these adapters' configs ask, and if all leave it open, where it is cheaper."""
        for compute in ("stacked", "merged"):
            for name in names:
                if self.compute[name] == compute:
                    return compute == "merged"
        stacked, merged = self._sum_of_costs(x, names)
        return merged < stacked

    def _sum_of_costs(self, x: Tensor, names: Sequence[str]) -> tuple[float, float]:
        if len(names) == 1:
            return self.costs(x, names[0])
        costs = [self.costs(x, name) for name in names]
        return sum(cost for cost, _ in costs), sum(cost for _, cost in costs)

    def _base_parameters(self) -> dict[str, Tensor]:
        base = self.get_base_layer()  # by getattr: FSDP hides parameters behind attributes while it runs
        return {name: getattr(base, name) for name, value in base._parameters.items() if value is not None}

    def _sources(self, names: list[str]) -> list[Tensor]:
        own = self._base_parameters().values()
        adaptors = [
            getattr(self, attribute)[name]
            for attribute in self.adapter_layer_names
            for name in names
            if name in getattr(self, attribute)
        ]
        return [*own, *adaptors, *(self.router.logits[name] for name in names), self.router.selection.client]

    def _add_mixtures(self, names: list[str], mixtures: list[Tensor]) -> dict[str, Tensor]:
        parameters = self._base_parameters()
        for adapter_name, mixture in zip(names, mixtures, strict=True):
            device = next(iter(parameters.values())).device
            for name, delta in self.parameter_deltas(adapter_name, mixture.to(device)).items():
                parameters[name] = parameters[name] + delta.to(parameters[name].dtype)
        return parameters

    def mixed_parameters(self) -> dict[str, Tensor]:
        """The base layer's parameters with the current client's mixtures added, in new tensors."""
        names = [name for name in self.active_adapters if self.holds(name)]
        return self._add_mixtures(names, [self._one_mixture(name) for name in names])

    @override
    def train(self, mode: bool = True) -> FloralLayer:
        self._cache.clear()
        return super().train(mode)

    # Merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight for the current client, in the weight's shape."""
        return self.parameter_deltas(adapter, self._one_mixture(adapter))["weight"]

    def _one_mixture(self, adapter_name: str) -> Tensor:
        mixture = self.router.mixture(adapter_name, self.slot[adapter_name], Selection(self.router.client))
        if len(mixture) > 1:
            raise ValueError(
                f"Layer {self.name}: {len(mixture)} clients are selected, but a weight can hold one client's mixture. "
                "Choose one with `set_client`."
            )
        return mixture

    @override
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the current client's mixture to the base layer's parameters.

        Args:
            safe_merge: check the merged parameters for values that are not finite, and leave the layer alone if so.
            adapter_names: default: all active adapters.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.holds(name):
                continue
            mixture = self._one_mixture(name).detach().clone()
            self._add_deltas(name, mixture, sign=1, safe=safe_merge)
            self._merged_mixtures[name] = mixture  # the router may change before `unmerge`
            self.merged_adapters.append(name)

    @override
    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base layer's parameters again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._add_deltas(name, self._merged_mixtures.pop(name), sign=-1, safe=False)

    def _add_deltas(self, adapter_name: str, mixture: Tensor, *, sign: int, safe: bool) -> None:
        base = self.get_base_layer()
        new = {}
        for name, delta in self.parameter_deltas(adapter_name, mixture).items():
            old = self.get_base_weight() if name == "weight" else getattr(base, name).data
            new[name] = old + sign * delta.to(device=old.device, dtype=old.dtype)
        if safe and not all(value.isfinite().all() for value in new.values()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken "
                f"(layer {self.name})."
            )
        for name, value in new.items():
            if name == "weight":
                self.set_base_weight(value)
            else:
                getattr(base, name).data = value

    @override
    def __repr__(self) -> str:
        return "floral." + super().__repr__()


def has_hooks(module: nn.Module) -> bool:
    """Whether anything hangs on a module that is to happen when it is called, a replaced `forward` included."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _is_plain(parameter: Tensor) -> bool:
    """Neither quantised nor sharded nor offloaded: what is read off it is the weight."""
    return type(parameter) in (nn.Parameter, Tensor) and parameter.is_floating_point() and not parameter.is_meta
