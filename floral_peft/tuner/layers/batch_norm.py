"""Batch norm whose adaptors have statistics of their own: as changes of the main scale and shift."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.layers.norm import Norm
from floral_peft.tuner.router import Router


@torch.library.custom_op("floral_peft::keep", mutates_args=())
def keep(tensor: Tensor) -> Tensor:
    """A copy that torch.compile cannot look into."""
    return tensor.clone()


@keep.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def _kept(tensor: Tensor) -> Tensor:
    """A value made of statistics, for use in a product that is differentiated.

    Compiled (torch 2.13), the backward pass makes it anew from the buffers, which the forward pass has changed by
    then: the gradient would silently be wrong.
    """
    return keep(tensor) if torch.compiler.is_compiling() else tensor


class _OwnStatistics(Norm):
    """What both kinds have in common: `floral_mean` and `floral_var`, (C, channels), that follow the batches."""

    other_param_names: tuple[str, ...] = (*Norm.other_param_names, "floral_mean", "floral_var")

    def __init__(self, base_layer: nn.Module, router: Router, name: str) -> None:
        super().__init__(base_layer, router, name)
        self.floral_mean = BufferDict({}, persistent=True)
        self.floral_var = BufferDict({}, persistent=True)
        # Within a forward pass in training: the main ones before it.
        self._before: tuple[Tensor, Tensor] | None = None

    @override
    def add_adaptors(self, adapter_name: str, config: FloralConfig, rank: int | None) -> None:
        if config.adapt_norms or check_target_module_exists(config, self.name):
            super().add_adaptors(adapter_name, config, rank)
        base = self.get_base_layer()
        self.floral_mean[adapter_name] = base.running_mean.detach().repeat(config.num_adaptors, 1)
        self.floral_var[adapter_name] = base.running_var.detach().repeat(config.num_adaptors, 1)

    @override
    def keep_adaptors(self, adapter_name: str, kept: Tensor) -> None:
        super().keep_adaptors(adapter_name, kept)
        for statistics in (self.floral_mean, self.floral_var):
            old = statistics[adapter_name]
            statistics[adapter_name] = old.index_select(0, kept.to(old.device))

    @override
    def _sources(self, names: list[str]) -> list[Tensor]:
        base = self.get_base_layer()
        own = [table[name] for table in (self.floral_mean, self.floral_var) for name in names]
        return [*super()._sources(names), *own, base.running_mean, base.running_var]

    def _names(self) -> list[str]:
        """The adapters that take part in a forward pass."""
        return [] if self.merged or self.disable_adapters else [n for n in self.active_adapters if self.holds(n)]

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self._names()
        base = self.get_base_layer()
        if not names or not base.training:
            return super().forward(x, *args, **kwargs)
        mean, var = self._before = base.running_mean.clone(), base.running_var.clone()
        try:
            result = super().forward(x, *args, **kwargs)
        finally:
            self._before = None
        self._track(names, mean, var)
        return result

    @torch.no_grad()
    def _track(self, names: list[str], mean: Tensor, var: Tensor) -> None:
        """Move the adaptors' statistics towards the batch's, which are read off the step that the main ones made.

        Args:
            names: the adapters.
            mean: the main running mean before the step.
            var: the main running variance before it.
        """
        base = self.get_base_layer()
        momentum = base.momentum if base.momentum is not None else 1 / base.num_batches_tracked
        if not momentum:
            return
        batch_mean = mean + (base.running_mean - mean) / momentum
        batch_var = var + (base.running_var - var) / momentum
        for name in names:
            mixture = self.router.mixture(name, self.slot[name]).mean(dim=0).to(mean)
            rate = momentum * self._followed(mixture)[:, None]
            self.floral_mean[name].add_(rate * (batch_mean - self.floral_mean[name]))
            self.floral_var[name].add_(rate * (batch_var - self.floral_var[name]))

    @abstractmethod
    def _followed(self, mixture: Tensor) -> Tensor:
        """How much of the main statistics' step each adaptor's make, (C,), for a mixture π, (C,)."""


class BatchNorm(_OwnStatistics):
    """With `train_base`: in evaluation adaptor c normalises by its own (μ_c, σ_c) in place of the main ones (μ, σ).

    That is a change of scale and shift, which a mixture mixes:

        γ → (σ / σ_c) γ,    β → β + ((μ − μ_c) / σ_c) γ

    In training a batch is normalised by its own statistics, as ever. An adaptor's move with them as far as it is used:
    at π_c / max π times the layer's momentum. Where activations differ from cluster to cluster, the mean of all
    clients' statistics fits nobody. A scale and a shift of its own an adaptor has only if the config asks for it.
    """

    exact_types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

    def __init__(self, base_layer: nn.Module, router: Router, name: str) -> None:
        super().__init__(base_layer, router, name)
        self._added: dict[str, dict[str, Tensor]] = {}  # what merged adapters have added

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Whether a layer is one of torch's own, with a scale, a shift and running statistics."""
        return type(base) in cls.exact_types and base.bias is not None and base.running_mean is not None

    @torch.no_grad()
    def pool(self, adapter_name: str, weights: Tensor) -> None:
        """Give all adaptors their mean's statistics.

        Args:
            adapter_name: the adapter.
            weights: p(c), (C,).
        """
        for statistics in (self.floral_mean, self.floral_var):
            old = statistics[adapter_name]
            old.copy_(torch.tensordot(weights.to(old), old, dims=1).expand_as(old))

    @override
    def parameter_deltas(self, adapter_name: str, mixture: Tensor) -> dict[str, Tensor]:
        return self._added.get(adapter_name) or super().parameter_deltas(adapter_name, mixture)

    @override
    def _add_deltas(self, adapter_name: str, mixture: Tensor, *, sign: int, safe: bool) -> None:
        # They depend on the scale, to which they are added, and on statistics that may move meanwhile.
        self._added[adapter_name] = self.parameter_deltas(adapter_name, mixture)
        stays = False
        try:
            super()._add_deltas(adapter_name, mixture, sign=sign, safe=safe)
            stays = sign > 0
        finally:
            if not stays:
                del self._added[adapter_name]

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What holds the main statistics alone (weights of the base, an older adapter) gives them to all adaptors."""
        for own, main in (("floral_mean", "running_mean"), ("floral_var", "running_var")):
            given = state_dict.get(f"{prefix}base_layer.{main}")
            if given is not None and not any(name.startswith(f"{prefix}{own}.") for name in state_dict):
                for name, held in getattr(self, own).items():
                    state_dict[f"{prefix}{own}.{name}"] = given.detach().repeat(len(held), 1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def _mixed(self, adapter_name: str, mixture: Tensor) -> dict[str, Tensor]:
        own = super()._mixed(adapter_name, mixture)
        if self._before is not None:  # the batch's own count
            return own
        base = self.get_base_layer()
        sigmas = (self.floral_var[adapter_name] + base.eps).sqrt()
        pi = mixture.to(sigmas)
        ratio = pi @ ((base.running_var + base.eps).sqrt() / sigmas)
        shift = pi @ ((base.running_mean - self.floral_mean[adapter_name]) / sigmas)
        scale = base.weight - sum(added["weight"] for added in self._added.values())
        whole = scale + own.get("weight", 0.0)
        return {"weight": whole * ratio - scale, "bias": whole * shift + own.get("bias", 0.0)}

    @override
    def _followed(self, mixture: Tensor) -> Tensor:
        return mixture / mixture.max()


class ReparametrizedBatchNorm(_OwnStatistics):
    """`adapt_norms="reparametrized"` (FLoRAL, appendix on batch norm).

    With an adaptor's statistics (μ_c, σ_c) and the main ones (μ, σ), it adds under the main statistics

        γ_c → (σ_c / σ) γ_c,    β_c → β_c + ((μ_c − μ) / σ) stopgrad(γ_c)

    The statistics here are the running ones, in training too, so that a mixture means the same in both modes. An
    adaptor's move at the rate π_c times the layer's momentum: one that the client does not use stays what it was. They
    describe a client's data and are private to it, as are the main ones (`private_buffers`).
    """

    @staticmethod
    def fits(base: nn.Module) -> bool:
        """Whether a layer has what this needs: a scale, and running statistics."""
        return isinstance(base, _BatchNorm) and base.weight is not None and base.running_mean is not None

    @override
    def tables(self, adapter_name: str) -> dict[str, Tensor]:
        tables = super().tables(adapter_name)
        ratio, shift = self._relative(adapter_name)
        if "bias" in tables:
            tables["bias"] = tables["bias"] + _kept(shift) * tables["weight"].detach()
        tables["weight"] = tables["weight"] * _kept(ratio)
        return tables

    @override
    def set_tables(self, adapter_name: str, tables: dict[str, Tensor]) -> None:
        ratio, shift = self._relative(adapter_name)
        weight = tables["weight"] / ratio
        own = {name: table - shift * weight if name == "bias" else weight for name, table in tables.items()}
        super().set_tables(adapter_name, own)

    def _relative(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """σ_c / σ and (μ_c − μ) / σ, (C, channels), by the statistics before the step at hand."""
        base = self.get_base_layer()
        mean, var = self._before or (base.running_mean, base.running_var)
        sigma = (var + base.eps).sqrt()
        sigmas = (self.floral_var[adapter_name] + base.eps).sqrt()
        return sigmas / sigma, (self.floral_mean[adapter_name] - mean) / sigma

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moves = self._names() and self.get_base_layer().training
        if moves and not torch.compiler.is_compiling() and torch._C._current_autograd_node() is not None:
            raise RuntimeError(
                f"Layer {self.name} is recomputed in backward (gradient checkpointing), but its statistics have moved "
                "since, so the gradients would be wrong. Do not checkpoint it, or use adapt_norms=True instead of "
                '"reparametrized".'
            )
        return super().forward(x, *args, **kwargs)

    @override
    def _followed(self, mixture: Tensor) -> Tensor:
        return mixture
