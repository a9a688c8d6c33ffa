"""Batch norm whose adaptors have statistics of their own, told as changes of the main scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
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


class ReparametrizedBatchNorm(Norm):
    """`adapt_norms="reparametrized"` (FLoRAL, appendix on batch norm).

    With an adaptor's statistics (μ_c, σ_c) and the main ones (μ, σ), it adds under the main statistics

        γ_c → (σ_c / σ) γ_c,    β_c → β_c + ((μ_c − μ) / σ) stopgrad(γ_c)

    The statistics here are the running ones, in training too, so that a mixture means the same in both modes. An
    adaptor's move at the rate π_c times the layer's momentum: one that the client does not use stays what it was. They
    describe a client's data and are private to it, as are the main ones (`private_buffers`).
    """

    other_param_names: tuple[str, ...] = (*Norm.other_param_names, "floral_mean", "floral_var")

    def __init__(self, base_layer: nn.Module, router: Router, name: str) -> None:
        super().__init__(base_layer, router, name)
        self.floral_mean = BufferDict({}, persistent=True)
        self.floral_var = BufferDict({}, persistent=True)
        self._before: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def fits(base: nn.Module) -> bool:
        """Whether a layer has what this needs: a scale, and running statistics."""
        return isinstance(base, _BatchNorm) and base.weight is not None and base.running_mean is not None

    @override
    def add_adaptors(self, adapter_name: str, config: FloralConfig, rank: int | None) -> None:
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
    def _sources(self, names: list[str]) -> list[Tensor]:
        base = self.get_base_layer()
        own = [table[name] for table in (self.floral_mean, self.floral_var) for name in names]
        return [*super()._sources(names), *own, base.running_mean, base.running_var]

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [] if self.merged or self.disable_adapters else [n for n in self.active_adapters if self.holds(n)]
        base = self.get_base_layer()
        if not names or not base.training:
            return super().forward(x, *args, **kwargs)
        if not torch.compiler.is_compiling() and torch._C._current_autograd_node() is not None:
            raise RuntimeError(
                f"Layer {self.name} is recomputed in backward (gradient checkpointing), but its statistics have moved "
                "since, so the gradients would be wrong. Do not checkpoint it, or use adapt_norms=True instead of "
                '"reparametrized".'
            )
        mean, var = self._before = base.running_mean.clone(), base.running_var.clone()
        try:
            result = super().forward(x, *args, **kwargs)
        finally:
            self._before = None
        self._track(names, mean, var)
        return result

    @torch.no_grad()
    def _track(self, names: list[str], mean: Tensor, var: Tensor) -> None:
        """Move the adaptors' statistics towards the batch's, which are read off the step that the main ones made."""
        base = self.get_base_layer()
        momentum = base.momentum if base.momentum is not None else 1 / base.num_batches_tracked
        if not momentum:
            return
        batch_mean = mean + (base.running_mean - mean) / momentum
        batch_var = var + (base.running_var - var) / momentum
        for name in names:
            rate = momentum * self.router.mixture(name, self.slot[name]).mean(dim=0).to(mean)[:, None]
            self.floral_mean[name].add_(rate * (batch_mean - self.floral_mean[name]))
            self.floral_var[name].add_(rate * (batch_var - self.floral_var[name]))
