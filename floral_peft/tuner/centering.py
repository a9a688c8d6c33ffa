"""LoRA centering: what all adaptors have in common moves into what all clients share (FLoRAL, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.tuner.layers import FloralLayer
from floral_peft.tuner.layers.factored import FactoredLayer
from floral_peft.tuner.layers.norm import Norm
from floral_peft.tuner.tied import sharing_layers


@torch.no_grad()
def center_adaptors(model: nn.Module, weights: Tensor) -> dict[str, float]:
    """Move the adaptors' mean into the base, and keep of each adaptor its difference from the mean.

        u ← u + s·E_c[a_c],    a_c ← SVD_r(a_c − E_c[a_c]),    E under p(c)

    Mixtures sum to 1, so every client's output stays what it was, but for what the truncation to rank r cuts off.
    Singular values are split evenly between the factors. Biases and the scales of norms have no rank: they are exact.
    With a frozen base the shared adaptor takes the mean, which is then truncated to its rank.

    Args:
        model: a model with FLORAL layers whose base trains (`train_base`), or that have a shared adaptor. Its active
            adapter is centered, in place.
        weights: p(c), (C,), at least 0 with a sum above 0; or (L, C), a row per layer, with `router_per_layer`.

    Returns:
        Layer name → the largest relative error (Frobenius norm) that the truncation makes in the layer's mean or in
        one of its adaptors.

    Raises:
        ValueError: `weights` are no weights, a layer has nowhere to put the mean, or is merged, or shares its weight.
    """
    layers = [module for module in model.modules() if isinstance(module, FloralLayer)]
    sharing = sharing_layers(model)
    for layer in layers:
        if layer.merged:
            raise ValueError(
                f"Layer {layer.name}: a client's mixture is merged into it. Call `unmerge_adapter` first."
            )
        if layer.name in sharing and _target(layer)[1]:
            raise ValueError(
                f"Layer {layer.name} shares its weight with {', '.join(sharing[layer.name])}, which the adaptors' "
                "mean would change too. Untie them first, or use FloralConfig(shared_r=...) with a frozen base."
            )
    plans = [(layer, *_target(layer), _mean_of(layer, weights)) for layer in layers]
    return {
        layer.name: _center(layer, adapter_name, into_base, mean) for layer, adapter_name, into_base, mean in plans
    }


def _target(layer: FloralLayer) -> tuple[str, bool]:
    """The layer's active adapter, and whether its mean goes into the base."""
    names = [name for name in layer.active_adapters if layer.holds(name)]
    if len(names) != 1:
        raise ValueError(f"Layer {layer.name} has {len(names)} active adapters; centering needs one: `set_adapter`.")
    shared = any(names[0] in getattr(layer, name) for name in layer.adapter_layer_names if "shared" in name)
    trains = all(parameter.requires_grad for parameter in layer.get_base_layer().parameters(recurse=False))
    if not trains and not shared:
        raise ValueError(
            f"Layer {layer.name} has nowhere to put the adaptors' mean: its base is frozen and there is no shared "
            "adaptor. Use FloralConfig(train_base=True) or FloralConfig(shared_r=...)."
        )
    return names[0], trains


def _mean_of(layer: FloralLayer, weights: Tensor) -> Tensor:
    adaptors = getattr(layer, layer.adapter_layer_names[0])
    name = next(name for name in layer.active_adapters if layer.holds(name))
    count, slots = len(adaptors[name]), layer.router.logits[name].shape[1]
    if weights.dim() == 2 and len(weights) != slots:
        raise ValueError(
            f"Layer {layer.name}: weights have the shape {tuple(weights.shape)}, expected (C,) or, with "
            f"`router_per_layer`, a row per layer; here a client has {slots} routers."
        )
    row = weights[layer.slot[name]] if weights.dim() == 2 else weights
    if row.shape != (count,) or not bool((row >= 0).all()) or not bool(row.isfinite().all()) or float(row.sum()) <= 0:
        raise ValueError(
            f"Layer {layer.name}: weights must be {count} numbers of at least 0 with a sum above 0, "
            f"got {row.tolist()}."
        )
    return (row / row.sum()).double()


def _center(layer: FloralLayer, adapter_name: str, into_base: bool, mean: Tensor) -> float:
    if isinstance(layer, Norm):
        return _center_norm(layer, adapter_name, into_base, mean)
    if not isinstance(layer, FactoredLayer):
        raise TypeError(f"Layer {layer.name}: a {type(layer).__name__} cannot be centered.")
    factors = layer.factors(adapter_name)
    mean = mean.to(factors.a.device)
    a, b = _as_matrices(factors.a, factors.b)  # (C, r, n), (C, m, r)
    errors = [0.0]
    if into_base:
        base: Any = layer.get_base_layer()
        delta = layer.delta_weight(factors, mean[None].to(factors.a.dtype))
        errors.append(_add(base.weight, delta))
    elif factors.shared_a is not None and factors.shared_b is not None:
        shared_a, shared_b = _as_matrices(factors.shared_a, factors.shared_b)
        rows = torch.cat([a.flatten(0, 1), shared_a.flatten(0, 1)])
        columns = torch.cat([_columns(b), _columns(shared_b)], dim=1)
        coefficients = torch.cat([mean.repeat_interleave(a.shape[1]), mean.new_ones(shared_a.shape[1])])
        new_a, new_b, error = refactor(rows, columns, coefficients[None], shared_a.shape[1])
        _write(factors.shared_a, factors.shared_b, new_a, new_b)
        errors.append(error)
    if adapter_name in layer.floral_bias:
        values = layer.floral_bias[adapter_name]
        common = torch.tensordot(mean.to(values), values, dims=1)
        errors.append(_receive(layer, "bias", adapter_name, into_base, common))
        values.sub_(common)
    difference = torch.eye(len(mean), dtype=mean.dtype, device=mean.device) - mean
    new_a, new_b, error = refactor(
        a.flatten(0, 1), _columns(b), difference.repeat_interleave(a.shape[1], dim=1), a.shape[1]
    )
    _write(factors.a, factors.b, new_a, new_b)
    return max(*errors, error)


def _center_norm(layer: Norm, adapter_name: str, into_base: bool, mean: Tensor) -> float:
    tables, errors = layer.tables(adapter_name), [0.0]
    for name, values in tables.items():
        common = torch.tensordot(mean.to(values), values, dims=1)
        errors.append(_receive(layer, name, adapter_name, into_base, common))
        tables[name] = values - common
    layer.set_tables(adapter_name, tables)
    return max(errors)


def _receive(layer: FloralLayer, name: str, adapter_name: str, into_base: bool, common: Tensor) -> float:
    """Put the mean of scales or biases, which have no rank, where all clients have it."""
    if into_base:
        return _add(getattr(layer.get_base_layer(), name), common * layer.scaling[adapter_name])
    return _add(getattr(layer, f"floral_shared_{name}")[adapter_name], common)


def _add(target: Tensor, delta: Tensor) -> float:
    """Add in place. Returns the relative error that the target's precision makes in what is added."""
    before = target.to(torch.float64, copy=True)
    target.add_(delta.to(target.dtype))
    size = float(delta.double().norm())
    error = float((target.double() - before - delta.double()).norm()) / size if size else 0.0
    return error if error > torch.finfo(delta.dtype).eps ** 0.5 else 0.0


def refactor(rows: Tensor, columns: Tensor, coefficients: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best rank-r factors of sums of rank-one terms, without ever making the matrices.

    Each of the C matrices is M_c = Σ_i coefficients[c, i] · columns[:, i] rows[i]ᵀ. With columns = Q R and rowsᵀ = P S
    it is Q (R diag(coefficients_c) Sᵀ) Pᵀ, whose small core is decomposed.

    Args:
        rows: (R, n).
        columns: (m, R).
        coefficients: (C, R).
        rank: r.

    Returns:
        First factors (C, r, n), second factors (C, m, r) with singular values split evenly, and the largest relative
        error of the C matrices. Where a matrix has a smaller rank, the factors are filled up with zeros.
    """
    q, upper = torch.linalg.qr(columns.double())
    p, lower = torch.linalg.qr(rows.double().T)
    core = (upper * coefficients.double()[:, None, :]) @ lower.T
    u, sigma, v = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, sigma.shape[-1])
    root = sigma[:, :kept].sqrt()
    second = q @ (u[:, :, :kept] * root[:, None, :])
    first = (root[:, :, None] * v[:, :kept]) @ p.T
    total = sigma.square().sum(-1)
    lost = sigma[:, kept:].square().sum(-1)
    error = torch.where(total > 0, lost / total, 0.0).sqrt().max()
    if kept < rank:
        first = nn.functional.pad(first, (0, 0, 0, rank - kept))
        second = nn.functional.pad(second, (0, rank - kept))
    return first, second, float(error)


def _as_matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(C, r, in...) and (out, C, r, kernel...) as (C, r, n) and (C, m, r), m counting (out, kernel)."""
    return a.flatten(2), b.movedim(0, 2).flatten(2).mT


def _columns(b: Tensor) -> Tensor:
    """(C, m, r) as (m, C·r)."""
    return b.movedim(0, 1).flatten(1)


def _write(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> None:
    """The inverse of `_as_matrices`, in place."""
    a.copy_(new_a.view(a.shape))
    out, c, r, *kernel = b.shape
    b.copy_(new_b.mT.reshape(c, r, out, *kernel).movedim(2, 0))
