"""Weights that several layers share, as embeddings and output layers of language models do."""

from __future__ import annotations

from torch import nn

from floral_peft.tuner.layers import FloralLayer


def sharing_layers(model: nn.Module) -> dict[str, list[str]]:
    """Names of the adapted layers that share their weight, each with the names of those that it shares it with."""
    users: dict[int, list[str]] = {}
    layers: list[tuple[str, FloralLayer]] = []
    for name, module in model.named_modules():
        if isinstance(module, FloralLayer):
            layers.append((name, module))
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    found = {}
    for name, layer in layers:
        others = {*users.get(id(layer.get_base_layer()._parameters.get("weight")), [])} - {name}
        if others:
            found[layer.name] = sorted(others)
    return found
