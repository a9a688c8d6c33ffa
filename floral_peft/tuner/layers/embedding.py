"""Embeddings: an adaptor looks up r numbers per token, and maps them to the embedding's dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from floral_peft.tuner.compute import Factors, linear_delta, per_example
from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.layers.factored import FactoredLayer, Geometry


class Embedding(FactoredLayer):
    """An embedding with C adaptors: A is a table (C, r, tokens), B is (dim, C, r).

    The table is the factor that starts at zero: tokens that no client has stay what they were, padding too.
    """

    exact_types = (nn.Embedding,)

    @override
    def geometry(self, config: FloralConfig) -> Geometry:
        return Geometry((self.in_features,), self.out_features, table=True)

    @override
    def add_adaptors(self, adapter_name: str, config: FloralConfig, rank: int | None) -> None:
        super().add_adaptors(adapter_name, config, rank)
        padding = self.get_base_layer().padding_idx
        if padding is not None:
            self.floral_A[adapter_name].detach()[:, :, padding] = 0

    @override
    def set_factors(self, adapter_name: str, a: Tensor, b: Tensor) -> None:
        padding = self.get_base_layer().padding_idx
        if padding is not None and not self.floral_A[adapter_name].detach()[:, :, padding].any():
            a = a.index_fill(2, torch.tensor(padding, device=a.device), 0.0)  # rounding may have left something
        super().set_factors(adapter_name, a, b)

    @override
    def _may_run_base(self) -> bool:
        base = self.get_base_layer()
        special = base.max_norm is not None or base.scale_grad_by_freq or base.sparse
        return not special and super()._may_run_base()  # these mean something else for a merged table

    @override
    def weight_numel(self) -> int:
        return self.in_features * self.out_features

    @override
    def add(self, x: Tensor, result: Tensor, factors: Factors, mixture: Tensor) -> Tensor:
        hidden = F.embedding(x, factors.first().T, padding_idx=self.get_base_layer().padding_idx)
        if len(x) > 1:  # else positions, say: looked up once for all examples
            if x.dim() == 1 and len(mixture) > 1 and len(x) != len(mixture):
                raise ValueError(
                    f"Layer {self.name}: {len(mixture)} clients were given, but its ids, of shape {tuple(x.shape)}, "
                    "do not say which example they belong to. Give ids of shape (batch, length) or (1, length), or "
                    "name the layer in `exclude_modules`."
                )
            mixture = per_example(mixture, len(x), self.name)
        hidden = factors.scaled_hidden(hidden, mixture, -1)
        added = F.linear(hidden, factors.second())
        scale = self._get_embed_scale()  # some models scale within the embedding
        return result + (added if scale is None else added * scale.to(added.dtype))

    @override
    def delta_weight(self, factors: Factors, mixture: Tensor) -> Tensor:
        return linear_delta(factors, mixture).T

    @override
    def run(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        base = self.get_base_layer()
        return F.embedding(
            x,
            parameters["weight"],
            base.padding_idx,
            base.max_norm,
            base.norm_type,
            base.scale_grad_by_freq,
            base.sparse,
        )

    @override
    def costs(self, x: Tensor, adapter_name: str) -> tuple[float, float]:
        """A lookup needs only the rows of the tokens at hand; merging makes all of them."""
        terms = self.floral_A[adapter_name].shape[0] * self.r[adapter_name]
        return float(x.numel() * terms * self.out_features), float(self.weight_numel() * terms)
