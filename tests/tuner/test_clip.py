"""Clipped steps against the matrices that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floral_peft import FloralConfig
from floral_peft.tuner import base_weights, clip_steps, factor_pairs

from .models import get_peft_model
from .reference import adaptor_weight, randomize


LAYERS = ("0", "3", "4", "5")


def trained(r: int = 2, **config: Any) -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
    )
    settings: dict[str, Any] = {"target_modules": LAYERS[:3], "num_adaptors": 3, "r": r, "train_base": True} | config
    model = get_peft_model(layers, FloralConfig(**settings)).double()
    randomize(model)
    model(torch.linspace(-2, 2, 96, dtype=torch.float64).view(2, 3, 4, 4)).square().sum().backward()
    return model


def step_of(layer: Any, c: int) -> Tensor:
    """The derivative of B A along the gradients, by what the layer's matrix is a little further on."""
    a, b = layer.floral_A["default"], layer.floral_B["default"]
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            a.add_(a.grad, alpha=sign * 1e-6)
            b.add_(b.grad, alpha=sign * 1e-6)
            moved.append(adaptor_weight(layer, "default", c))
            a.add_(a.grad, alpha=-sign * 1e-6)
            b.add_(b.grad, alpha=-sign * 1e-6)
    return (moved[0] - moved[1]) / 2e-6


@pytest.mark.parametrize("conv_split", ["balanced_2d", "in", "out"])
@pytest.mark.parametrize("r", [1, 2])
def test_long_steps_end_at_the_norm_and_short_ones_stay(r: int, conv_split: str) -> None:
    model = trained(r, conv_split=conv_split)
    adapted = [model.base_model.model[int(name)] for name in LAYERS[:3]]
    before = [[step_of(layer, c) for c in range(3)] for layer in adapted]
    norms = torch.tensor([[float(step.norm()) for step in steps] for steps in before])
    limit = float(norms.median())
    bias = adapted[1].floral_bias["default"].grad.clone()
    clip_steps(model, limit)
    for layer, steps, own in zip(adapted, before, norms, strict=True):
        for c, norm in enumerate(own):
            torch.testing.assert_close(
                step_of(layer, c), steps[c] * min(1.0, limit / float(norm)), rtol=1e-5, atol=1e-6
            )
    for weight in base_weights(model):
        assert float(weight.grad.norm()) <= limit * (1 + 1e-9)  # type: ignore[union-attr]
    assert torch.equal(adapted[1].floral_bias["default"].grad, bias)


def test_base_weights_are_its_matrices_adapted_or_not() -> None:
    model = trained()
    shapes = [tuple(weight.shape) for weight in base_weights(model)]
    assert shapes == [(4, 3, 3, 3), (16, 16), (16, 16), (3, 16)]
    assert base_weights(trained(train_base=False)) == []


def test_a_loop_gives_the_factors_and_weights_itself() -> None:
    one, other = trained(), trained()
    clip_steps(one, 0.5)
    clip_steps(factor_pairs(other), 0.5, base_weights(other))
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert first.grad is second.grad is None or torch.equal(first.grad, second.grad)
    alone = trained()
    clip_steps(factor_pairs(alone), 0.5)
    assert torch.equal(base_weights(alone)[0].grad, base_weights(trained())[0].grad)  # type: ignore[arg-type]


def test_zero_and_missing_gradients_do_no_harm() -> None:
    model = trained()
    for _, b in factor_pairs(model):
        b.grad = None
    for weight in base_weights(model):
        weight.grad = torch.zeros_like(weight)
    layer = model.base_model.model[3]
    layer.floral_A["default"].grad[1] = 0
    clip_steps(model, 1e-3)
    assert all(not weight.grad.any() for weight in base_weights(model))  # type: ignore[union-attr]
    assert not layer.floral_A["default"].grad[1].any() and layer.floral_B["default"].grad is None
    gradient = layer.floral_A["default"].grad[0]
    assert float((layer.floral_B["default"][:, 0].detach() @ gradient).norm()) == pytest.approx(1e-3)
    model.zero_grad()
    clip_steps(model, 1.0)
    with pytest.raises(ValueError, match=r"max_norm=0\.0 must be above 0"):
        clip_steps(model, 0.0)
