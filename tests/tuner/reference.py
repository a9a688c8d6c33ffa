"""An independent float64 computation of the model, written with loops, to hold the layers against."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every adaptor and router of a model values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".floral_" in name or ".logits." in name:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(values * (1.0 if ".logits." in name else 0.3))


def adaptor_weight(layer: Any, adapter: str, c: int) -> Tensor:
    """W_c = U_c V_cᵀ in the shape of the layer's weight, float64; c = -1 is the shared adaptor."""
    if c < 0:
        a, b = layer.floral_shared_A[adapter][0], layer.floral_shared_B[adapter][:, 0]
    else:
        a, b = layer.floral_A[adapter][c], layer.floral_B[adapter][:, c]
    a, b = a.detach().double(), b.detach().double()
    base = layer.get_base_layer()
    if not hasattr(base, "kernel_size"):
        product: Any = sum(torch.outer(b[:, i], a[i]) for i in range(len(a)))  # (out, in)
        return product if isinstance(base, nn.Linear) else product.T
    transposed = type(base).__name__.startswith("ConvTranspose")  # its weight is (in, out, ...)
    weight = torch.zeros(base.weight.shape, dtype=torch.float64)
    position: Any
    for position in itertools.product(*(range(size) for size in base.kernel_size)):
        at_a: Any = tuple(p if a.shape[2 + d] > 1 else 0 for d, p in enumerate(position))
        at_b: Any = tuple(p if b.shape[2 + d] > 1 else 0 for d, p in enumerate(position))
        for i in range(len(a)):
            term = torch.outer(b[(slice(None), i, *at_b)], a[(i, slice(None), *at_a)])
            weight[(slice(None), slice(None), *position)] += term.T if transposed else term
    return weight


def mixed_layer(layer: Any, adapter: str, pi: Tensor, scale: float) -> nn.Module:
    """A plain float64 layer with the weights of the mixture: W + s·(Σ_c π_c U_c V_cᵀ + shared), biases likewise."""
    base = layer.get_base_layer()
    plain: Any = clone_double(base)
    if hasattr(layer, "floral_weight"):
        return mixed_norm(layer, adapter, pi, scale, plain)
    with torch.no_grad():
        for c, weight in enumerate(pi.double()):
            plain.weight += scale * weight * adaptor_weight(layer, adapter, c)
            if adapter in layer.floral_bias:
                plain.bias += scale * weight * layer.floral_bias[adapter][c].double()
        if adapter in layer.floral_shared_A:
            plain.weight += scale * adaptor_weight(layer, adapter, -1)
        if adapter in layer.floral_shared_bias:
            plain.bias += scale * layer.floral_shared_bias[adapter][0].double()
    return plain


def mixed_norm(layer: Any, adapter: str, pi: Tensor, scale: float, plain: Any) -> nn.Module:
    """The same for a normalisation layer: γ + s·(Σ_c π_c γ_c + shared), the shift likewise."""
    with torch.no_grad():
        for name in ("weight", "bias"):
            tables, shared = getattr(layer, f"floral_{name}"), getattr(layer, f"floral_shared_{name}")
            if adapter in tables:
                for c, weight in enumerate(pi.double()):
                    getattr(plain, name).add_(scale * weight * tables[adapter][c].double())
            if adapter in shared:
                getattr(plain, name).add_(scale * shared[adapter][0].double())
    return plain


def clone_double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())
