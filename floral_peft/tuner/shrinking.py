"""Making an adapter smaller for good: fewer adaptors, or a lower rank. And larger for a while."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from floral_peft.tuner.centering import base_trains, mean_weights, share_mean, truncate
from floral_peft.tuner.layers import BatchNorm, FloralLayer
from floral_peft.tuner.layers.factored import FactoredLayer
from floral_peft.tuner.layers.norm import Norm
from floral_peft.tuner.low_rank import as_columns, as_factors, as_matrices, refactor, spectra
from floral_peft.tuner.router import Router
from floral_peft.tuner.tied import sharing_layers


@dataclass
class Ranks:
    """An adapter's ranks: its config's fields, and what they gave each layer."""

    r: int
    budget: float | None
    rank_pattern: dict[str, int]
    layers: dict[str, int] = field(default_factory=dict)


class Shrinking:
    """Mixin of a [`FloralModel`]: tensors shrink, and with them what is saved and sent.

    Parameters that shrink are new objects: make optimisers anew afterwards.
    """

    if TYPE_CHECKING:
        peft_config: dict[str, Any]
        active_adapters: Any
        floral_router: Router
        model: nn.Module

        def _check_not_merged(self, intent: str) -> None: ...

        def _layers(self) -> Iterable[FloralLayer]: ...

    def keep_adaptors(self, indices: Sequence[int] | Tensor, adapter_name: str | None = None) -> None:
        """Keep only these adaptors; the others are gone from all layers and all clients' routers.

        Each client's mixture becomes its softmax over those left: what it gave the others is shared out in proportion.

        Args:
            indices: numbers of the adaptors to keep, in their new order.
            adapter_name: the adapter; by default, the first active one.

        Raises:
            ValueError: a number is missing, given twice, or no adaptor's; or a client's mixture is merged.
            TypeError: an index is no int.
        """
        name = self._adapter(adapter_name)
        config = self.peft_config[name]
        kept = _checked(indices, config.num_adaptors)
        self._check_not_merged("remove adaptors")
        for layer in self._layers():
            if layer.holds(name):
                layer.keep_adaptors(name, kept)
        self.floral_router.keep_adaptors(name, kept)
        config.num_adaptors = len(kept)
        if config.router_top_k is not None:
            config.router_top_k = min(config.router_top_k, len(kept))

    def make_room(self, num_adaptors: int, router_top_k: int | None = None, adapter_name: str | None = None) -> None:
        """Raise the number of adaptors: each new one is a copy of one of those that there are, in turn.

        Clients' routers are copied, too: where all adaptors have as many copies, these share the weight of theirs, and
        every client's model stays what it was.

        Args:
            num_adaptors: how many there are to be.
            router_top_k: how many of them are mixed, as in `FloralConfig`.
            adapter_name: the adapter; by default, the first active one.
        """
        name = self._adapter(adapter_name)
        self._check_not_merged("add adaptors")
        copies = torch.arange(num_adaptors) % self.peft_config[name].num_adaptors
        for layer in self._layers():
            if layer.holds(name):
                layer.keep_adaptors(name, copies)
        self.floral_router.keep_adaptors(name, copies)
        self.peft_config[name].num_adaptors = num_adaptors
        self.peft_config[name].router_top_k = self.floral_router.settings[name].top_k = router_top_k

    def compress(
        self,
        r: int | None = None,
        budget: float | None = None,
        weights: Tensor | None = None,
        adapter_name: str | None = None,
    ) -> dict[str, float]:
        """Lower the rank of all adaptors to `r`, or to what a budget gives each layer; smaller ranks stay.

        Each adaptor becomes its best approximation (truncated SVD, the singular values split evenly). Where a layer's
        base trains and less is lost that way, the adaptors' mean goes into the base before (`center_adaptors`): the
        rank is then spent on their differences. Norms, which have no rank, are left alone.

        Args:
            r: the new rank, or
            budget: ρ in (0, 1], as in `FloralConfig`; one of the two.
            weights: p(c), (C,), or (L, C) with `router_per_layer`: how much each adaptor counts. Uniform by default.
            adapter_name: the adapter; by default, the first active one.

        Returns:
            Layer name → the share of the adaptors that is lost: √(Σ_c p(c) ‖lost_c‖² / Σ_c p(c) ‖B_c A_c‖²).

        Raises:
            ValueError: not one of `r` and `budget` is given, or an argument is out of range; or a client's mixture is
                merged.
        """
        if (r is None) == (budget is None):
            raise ValueError(f"compress takes a rank or a budget, got r={r!r} and budget={budget!r}.")
        name = self._adapter(adapter_name)
        config = self.peft_config[name]
        wanted = replace(config, r=config.r if r is None else r, budget=budget, rank_pattern={})  # checks both
        self._check_not_merged("compress its adaptors")
        layers = [layer for layer in self._layers() if isinstance(layer, FactoredLayer) and layer.holds(name)]
        counted = torch.ones(config.num_adaptors) if weights is None else weights
        means = [mean_weights(layer, name, counted) for layer in layers]
        tied = sharing_layers(self.model)
        lost = {}
        for layer, mean in zip(layers, means, strict=True):
            rank = min(layer.r[name], layer.rank_by(wanted))
            lost[layer.name] = _truncate(layer, name, rank, mean, base_trains(layer) and layer.name not in tied)
            if rank != layer.rank_by(wanted):
                wanted.rank_pattern[f"^{re.escape(layer.name)}"] = rank
        config.r, config.budget, config.rank_pattern = wanted.r, wanted.budget, wanted.rank_pattern
        return lost

    def ranks(self, adapter_name: str | None = None) -> Ranks:
        """An adapter's ranks.

        Args:
            adapter_name: the adapter; by default, the first active one.
        """
        name = self._adapter(adapter_name)
        config = self.peft_config[name]
        layers = [layer for layer in self._layers() if isinstance(layer, FactoredLayer) and layer.holds(name)]
        return Ranks(
            config.r, config.budget, dict(config.rank_pattern), {layer.name: layer.r[name] for layer in layers}
        )

    def widens(self, r: int, adapter_name: str | None = None) -> bool:
        """Whether `widen` would raise the rank of any layer."""
        name = self._adapter(adapter_name)
        layers = [layer for layer in self._layers() if isinstance(layer, FactoredLayer) and layer.holds(name)]
        return any(layer.r[name] < min(r, layer.geometry(self.peft_config[name]).full_rank) for layer in layers)

    @torch.no_grad()
    def widen(self, r: int, seed: int, adapter_name: str | None = None) -> Ranks:
        """Raise the rank of all adaptors to `r`, where it is lower. The model stays what it was: new terms are zero.

        In a layer smaller than `r` it is raised to the layer's own rank: more would add nothing, and of the larger
        factor some directions could not be told from rounding.

        Args:
            r: the new rank.
            seed: of the new terms' factors that are drawn.
            adapter_name: the adapter; by default, the first active one.

        Returns:
            The ranks that there were, for `narrow`.
        """
        name = self._adapter(adapter_name)
        config = self.peft_config[name]
        self._check_not_merged("raise its adaptors' rank")
        before = self.ranks(name)
        layers = [layer for layer in self._layers() if isinstance(layer, FactoredLayer) and layer.holds(name)]
        config.r, config.budget, config.rank_pattern = r, None, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in layers:
                wanted = min(r, layer.geometry(config).full_rank)
                if layer.r[name] < wanted:
                    layer.set_factors(name, *layer.with_rank(name, config, wanted))
                if layer.r[name] != r:
                    config.rank_pattern[f"^{re.escape(layer.name)}"] = layer.r[name]
        return before

    def narrow(self, ranks: Ranks, weights: Tensor | None = None, adapter_name: str | None = None) -> dict[str, float]:
        """Undo `widen` as `compress` would: each layer back to its rank.

        Args:
            ranks: what `widen` returned.
            weights: as of `compress`.
            adapter_name: the adapter; by default, the first active one.

        Returns:
            Layer name → what is lost, as of `compress`.
        """
        name = self._adapter(adapter_name)
        config = self.peft_config[name]
        self._check_not_merged("compress its adaptors")
        counted = torch.ones(config.num_adaptors) if weights is None else weights
        tied = sharing_layers(self.model)
        lost = {}
        for layer in self._layers():
            if isinstance(layer, FactoredLayer) and layer.holds(name):
                mean = mean_weights(layer, name, counted)
                may_center = base_trains(layer) and layer.name not in tied
                lost[layer.name] = _truncate(layer, name, ranks.layers[layer.name], mean, may_center)
        config.r, config.budget, config.rank_pattern = ranks.r, ranks.budget, dict(ranks.rank_pattern)
        return lost

    @torch.no_grad()
    def pool(
        self, weights: Tensor | None = None, ranks: Ranks | None = None, adapter_name: str | None = None
    ) -> dict[str, float]:
        """Make of all adaptors a single one, their mean: all clients then have one model.

        It is the mean's best approximation of the adaptors' rank (truncated SVD, the singular values split evenly).

        Args:
            weights: as of `compress`.
            ranks: what `widen` returned, if that is to be undone, too.
            adapter_name: the adapter; by default, the first active one.

        Returns:
            Layer name → the share of the mean that is lost (Frobenius norm).
        """
        name = self._adapter(adapter_name)
        config = self.peft_config[name]
        self._check_not_merged("make one of its adaptors")
        counted = torch.ones(config.num_adaptors) if weights is None else weights
        layers = [layer for layer in self._layers() if layer.holds(name)]
        means = [mean_weights(layer, name, counted) for layer in layers]
        lost = {}
        for layer, mean in zip(layers, means, strict=True):
            if isinstance(layer, FactoredLayer):
                rank = layer.r[name] if ranks is None else ranks.layers[layer.name]
                lost[layer.name] = _pool(layer, name, rank, mean)
            elif isinstance(layer, Norm):
                tables = layer.tables(name)
                layer.set_tables(name, {key: _mean(table, mean).expand_as(table) for key, table in tables.items()})
                if isinstance(layer, BatchNorm):
                    layer.pool(name, mean)
        if ranks is not None:
            config.r, config.budget, config.rank_pattern = ranks.r, ranks.budget, dict(ranks.rank_pattern)
        self.keep_adaptors([0], name)
        return lost

    def _adapter(self, adapter_name: str | None) -> str:
        name: str = self.active_adapters[0] if adapter_name is None else adapter_name
        if name not in self.peft_config:
            raise ValueError(f"There is no adapter {name!r}; the model has {', '.join(self.peft_config)}.")
        return name


@torch.no_grad()
def _truncate(layer: FactoredLayer, adapter_name: str, rank: int, mean: Tensor, may_center: bool) -> float:
    """Truncate a layer's adaptors, centered before where that loses less. Returns the share that is lost."""
    if rank == layer.r[adapter_name]:
        return 0.0
    a, b = as_matrices(layer.floral_A[adapter_name], layer.floral_B[adapter_name])
    mean = mean.to(a.device)
    each = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)

    def squares(kept: Tensor) -> tuple[float, float]:
        """Of all singular values, and of those that are cut off: means under p(c)."""
        terms = kept.repeat_interleave(a.shape[1], dim=1)
        sigma = spectra(a.flatten(0, 1), as_columns(b), terms).square()
        return float(mean @ sigma.sum(-1)), float(mean @ sigma[:, rank:].sum(-1))

    whole, lost = squares(each)
    centered = squares(each - mean)[1] if may_center else lost
    if centered < lost:
        share_mean(layer, adapter_name, into_base=True, mean=mean)
    truncate(layer, adapter_name, rank, less=mean if centered < lost else None)
    return (min(lost, centered) / whole) ** 0.5 if whole else 0.0


def _mean(table: Tensor, weights: Tensor) -> Tensor:
    return torch.tensordot(weights.to(table), table, dims=1)


def _pool(layer: FactoredLayer, adapter_name: str, rank: int, mean: Tensor) -> float:
    """Make each of a layer's adaptors their mean, at a rank. Returns the relative error."""
    factors = layer.factors(adapter_name)
    a, b = as_matrices(factors.a, factors.b)
    terms = mean.to(a.device).repeat_interleave(a.shape[1])[None]
    first, second, lost = refactor(a.flatten(0, 1), as_columns(b), terms, rank)
    first, second = first.expand(len(a), -1, -1), second.expand(len(a), -1, -1)
    layer.set_factors(adapter_name, *as_factors(first, second, factors.a, factors.b))
    if factors.bias is not None:
        factors.bias.copy_(_mean(factors.bias, mean).expand_as(factors.bias))
    return lost


def _checked(indices: Sequence[int] | Tensor, count: int) -> Tensor:
    chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"Adaptors are kept by their numbers, got {index!r}.")
        if not 0 <= index < count:
            raise ValueError(f"There is no adaptor {index}: the adapter has {count}, 0 to {count - 1}.")
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"keep_adaptors needs at least one adaptor, and each once, got {chosen}.")
    return torch.tensor(chosen)
