"""LoRA centering: what all adaptors have in common moves into what all clients share (FLoRAL, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.tuner.layers import FloralLayer
from floral_peft.tuner.layers.factored import FactoredLayer
from floral_peft.tuner.layers.norm import Norm
from floral_peft.tuner.low_rank import as_columns, as_factors, as_matrices, refactor
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
    targets = [(layer, *_target(layer)) for layer in layers]
    means = [mean_weights(layer, adapter_name, weights) for layer, adapter_name, _ in targets]
    return {
        layer.name: _center(layer, adapter_name, into_base, mean)
        for (layer, adapter_name, into_base), mean in zip(targets, means, strict=True)
    }


def _target(layer: FloralLayer) -> tuple[str, bool]:
    """The layer's active adapter, and whether its mean goes into the base."""
    names = [name for name in layer.active_adapters if layer.holds(name)]
    if len(names) != 1:
        raise ValueError(f"Layer {layer.name} has {len(names)} active adapters; centering needs one: `set_adapter`.")
    shared = any(names[0] in getattr(layer, name) for name in layer.adapter_layer_names if "shared" in name)
    trains = base_trains(layer)
    if not trains and not shared:
        raise ValueError(
            f"Layer {layer.name} has nowhere to put the adaptors' mean: its base is frozen and there is no shared "
            "adaptor. Use FloralConfig(train_base=True) or FloralConfig(shared_r=...)."
        )
    return names[0], trains


def base_trains(layer: FloralLayer) -> bool:
    """Whether a layer's base parameters train."""
    return all(parameter.requires_grad for parameter in layer.get_base_layer().parameters(recurse=False))


def mean_weights(layer: FloralLayer, adapter_name: str, weights: Tensor) -> Tensor:
    """p(c) of one layer, (C,), float64, of weights (C,) or (L, C).

    Raises:
        ValueError: they are no weights.
    """
    _, slots, count = layer.router.logits[adapter_name].shape
    if weights.dim() == 2 and len(weights) != slots:
        raise ValueError(
            f"Layer {layer.name}: weights have the shape {tuple(weights.shape)}, expected (C,) or, with "
            f"`router_per_layer`, a row per layer; here a client has {slots} routers."
        )
    row = weights[layer.slot[adapter_name]] if weights.dim() == 2 else weights
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
    error = share_mean(layer, adapter_name, into_base, mean)
    return max(error, truncate(layer, adapter_name, layer.r[adapter_name], less=mean))


def share_mean(layer: FactoredLayer, adapter_name: str, into_base: bool, mean: Tensor) -> float:
    """Add the adaptors' mean to what all clients have, and take that of the biases from the adaptors.

    Args:
        layer: the layer.
        adapter_name: its adapter.
        into_base: whether the base takes the mean, else the shared adaptor.
        mean: p(c), (C,), float64.

    Returns:
        The largest relative error that this makes.
    """
    factors = layer.factors(adapter_name)
    mean = mean.to(factors.a.device)
    errors = [0.0]
    if into_base:
        base: Any = layer.get_base_layer()
        delta = layer.delta_weight(factors, mean[None].to(factors.a.dtype))
        errors.append(_add(base.weight, delta))
    elif factors.shared_a is not None and factors.shared_b is not None:
        a, b = as_matrices(factors.a, factors.b)  # (C, r, n), (C, m, r)
        shared_a, shared_b = as_matrices(factors.shared_a, factors.shared_b)
        rows = torch.cat([a.flatten(0, 1), shared_a.flatten(0, 1)])
        columns = torch.cat([as_columns(b), as_columns(shared_b)], dim=1)
        coefficients = torch.cat([mean.repeat_interleave(a.shape[1]), mean.new_ones(shared_a.shape[1])])
        first, second, error = refactor(rows, columns, coefficients[None], shared_a.shape[1])
        new_a, new_b = as_factors(first, second, factors.shared_a, factors.shared_b)
        factors.shared_a.copy_(new_a)
        factors.shared_b.copy_(new_b)
        errors.append(error)
    if adapter_name in layer.floral_bias:
        values = layer.floral_bias[adapter_name]
        common = torch.tensordot(mean.to(values), values, dims=1)
        errors.append(_receive(layer, "bias", adapter_name, into_base, common))
        values.sub_(common)
    return max(errors)


def truncate(layer: FactoredLayer, adapter_name: str, rank: int, less: Tensor | None = None) -> float:
    """Make of a layer's adaptors their best approximations of a rank, singular values split evenly.

    Args:
        layer: the layer.
        adapter_name: its adapter.
        rank: the new rank.
        less: p(c), (C,), float64: the adaptors' mean under it is taken from them before.

    Returns:
        The largest relative error of an adaptor.
    """
    factors = layer.factors(adapter_name)
    a, b = as_matrices(factors.a, factors.b)
    kept = torch.eye(len(a), dtype=torch.float64, device=a.device)
    if less is not None:
        kept = kept - less.to(a.device)
    first, second, error = refactor(a.flatten(0, 1), as_columns(b), kept.repeat_interleave(a.shape[1], dim=1), rank)
    layer.set_factors(adapter_name, *as_factors(first, second, factors.a, factors.b))
    return error


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
