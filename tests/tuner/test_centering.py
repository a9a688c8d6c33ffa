"""Centering changes no client's output beyond what it reports, and does what the paper's formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from floral_peft import FloralConfig
from floral_peft.tuner import center_adaptors
from floral_peft.tuner.low_rank import refactor

from .models import get_peft_model
from .reference import adaptor_weight, randomize, relative_error


P = torch.tensor([3.0, 1.0, 0.0, 2.0])


def net(**config: Any) -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.Linear(8, 5)
    )
    settings: dict[str, Any] = {"target_modules": ["0", "1", "4", "5"], "num_clients": 6, "alpha": 1.5} | config
    model = get_peft_model(layers, FloralConfig(**settings)).double()
    randomize(model)
    return model


X = torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).view(2, 3, 4, 4)


def outputs(model: Any) -> torch.Tensor:
    rows = []
    for client in range(6):
        with model.client(client):
            rows.append(model(X).detach())
    return torch.stack(rows)


@pytest.mark.parametrize("router_per_layer", [False, True])
def test_no_output_changes_where_nothing_is_cut_off(router_per_layer: bool) -> None:
    """A rank of 4·2 holds whatever four adaptors of rank 2 add up to."""
    model = net(r=8, train_base=True, router_per_layer=router_per_layer)
    with torch.no_grad():
        for layer in (model.base_model.model[i] for i in (0, 4, 5)):
            layer.floral_A["default"][:, 2:] = 0
    expected = outputs(model)
    errors = center_adaptors(model, P.expand(4, 4) if router_per_layer else P)
    assert set(errors) == {"0", "1", "4", "5"} and max(errors.values()) < 1e-7
    assert relative_error(outputs(model), expected) < 1e-12


def test_the_mean_goes_into_the_base_and_leaves_the_adaptors() -> None:
    model = net(r=8, train_base=True)
    layer = model.base_model.model[4]
    before = [adaptor_weight(layer, "default", c) for c in range(4)]
    base, bias = layer.base_layer.weight.detach().clone(), layer.floral_bias["default"].detach().clone()
    mean = sum(p * w for p, w in zip(P / 6, before, strict=True))
    center_adaptors(model, P)
    torch.testing.assert_close(layer.base_layer.weight.detach(), base + 1.5 * mean)
    for c in range(4):
        expected = before[c] - mean
        u, s, v = torch.linalg.svd(expected, full_matrices=False)
        torch.testing.assert_close(adaptor_weight(layer, "default", c), (u[:, :8] * s[:8]) @ v[:8])
    torch.testing.assert_close((P.double() / 6) @ layer.floral_bias["default"].detach(), torch.zeros(8).double())
    torch.testing.assert_close(layer.floral_bias["default"].detach(), bias - (P.double() / 6) @ bias)


def test_a_truncation_is_reported_and_bounds_the_change() -> None:
    model = net(r=2, train_base=True)
    expected = outputs(model)
    errors = center_adaptors(model, P)
    assert errors["1"] == 0.0 and 0.1 < errors["4"] < 1.0
    assert 1e-3 < relative_error(outputs(model), expected) < max(errors.values())


def test_a_frozen_base_leaves_the_mean_to_the_shared_adaptor() -> None:
    model = net(r=8, shared_r=12)
    with torch.no_grad():
        for layer in (model.base_model.model[i] for i in (0, 4, 5)):
            layer.floral_A["default"][:, 2:] = 0
            layer.floral_shared_A["default"][:, 4:] = 0
    expected = outputs(model)
    base = model.base_model.model[4].base_layer.weight.clone()
    assert max(center_adaptors(model, P).values()) < 1e-7
    assert relative_error(outputs(model), expected) < 1e-12
    assert torch.equal(model.base_model.model[4].base_layer.weight, base)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({}, P, r"Layer 0 has nowhere.*train_base=True.*shared_r"),
        ({"train_base": True}, P[:3], r"must be 4 numbers"),
        ({"train_base": True}, -P, "at least 0"),
        ({"train_base": True}, P * 0, "sum above 0"),
    ],
)
def test_what_cannot_be_centered_is_refused_and_left_alone(
    config: dict[str, Any], weights: torch.Tensor, message: str
) -> None:
    model = net(**config)
    expected = outputs(model)
    with pytest.raises(ValueError, match=message):
        center_adaptors(model, weights)
    assert torch.equal(outputs(model), expected)


def test_refactoring_fills_up_with_zeros() -> None:
    first, second, error = refactor(torch.randn(2, 7), torch.randn(5, 2), torch.ones(3, 2), 4)
    assert first.shape == (3, 4, 7) and second.shape == (3, 5, 4) and error < 1e-7
    assert not first[:, 2:].any() and not second[:, :, 2:].any()
