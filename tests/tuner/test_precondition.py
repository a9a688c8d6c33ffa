"""Preconditioned gradients against the formula, and where the paper's own blow up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from floral_peft import FloralConfig
from floral_peft.tuner import clip_steps, factor_pairs, precondition_gradients

from .models import get_peft_model
from .reference import randomize


def test_each_factor_is_scaled_by_the_inverse_gram_matrix_of_the_other() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    config = FloralConfig(target_modules=["0", "2", "4"], num_adaptors=3, r=2, shared_r=2)
    model = get_peft_model(net, config).double()
    randomize(model)
    model(torch.randn(5, 6).double()).square().sum().backward()
    layers = [model.base_model.model[i] for i in (0, 2, 4)]
    pairs = [
        (layer.floral_A["default"][c], layer.floral_B["default"][:, c], c, layer) for layer in layers for c in range(3)
    ]
    expected = []
    for a, b, c, layer in pairs:
        ga, gb = layer.floral_A["default"].grad[c].clone(), layer.floral_B["default"].grad[:, c].clone()
        gram_a, gram_b = a @ a.T, b.T @ b
        epsilon = 0.1 * (gram_a.trace() + gram_b.trace()) / 4 * torch.eye(2).double()
        expected.append((torch.inverse(gram_b + epsilon) @ ga, gb @ torch.inverse(gram_a + epsilon)))
    router = model.base_model.router.logits["default"].grad.clone()
    precondition_gradients(model)
    for (_, _, c, layer), (ga, gb) in zip(pairs, expected, strict=True):
        torch.testing.assert_close(layer.floral_A["default"].grad[c], ga)
        torch.testing.assert_close(layer.floral_B["default"].grad[:, c], gb)
    assert torch.equal(model.base_model.router.logits["default"].grad, router)


@pytest.mark.parametrize("split", ["balanced_2d", "in", "out"])
def test_convolution_factors_are_taken_as_matrices(split: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 3)), FloralConfig(target_modules=["0"], num_adaptors=2, r=3, conv_split=split)
    ).double()
    randomize(model)
    model(torch.randn(2, 4, 5, 5).double()).square().sum().backward()
    layer = model.base_model.model[0]
    a, b = layer.floral_A["default"].detach()[1].flatten(1), layer.floral_B["default"].detach()[:, 1]
    ga = layer.floral_A["default"].grad[1].flatten(1).clone()
    b = torch.cat([b[:, :, i, j] for i in range(b.shape[2]) for j in range(b.shape[3])])
    epsilon = 0.1 * ((a @ a.T).trace() + (b.T @ b).trace()) / 6 * torch.eye(3).double()
    precondition_gradients(model)
    torch.testing.assert_close(layer.floral_A["default"].grad[1].flatten(1), torch.linalg.solve(b.T @ b + epsilon, ga))


def test_the_gradient_stays_tame_where_one_factor_is_zero() -> None:
    """The paper's ε = 1e-5 multiplies the gradient by 1e5 there; ours at most by about r / damping over A's scale."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(50, 20)), FloralConfig(target_modules=["0"], r=4))
    layer = model.base_model.model[0]
    x, y = torch.randn(64, 50), torch.randn(64, 20)
    (model(x) - y).square().mean().backward()
    before = {name: p.grad.norm() for name, p in model.named_parameters() if "floral" in name}
    precondition_gradients(model)
    assert not layer.floral_A["default"].grad.any()
    for name, p in model.named_parameters():
        if "floral" in name:
            assert p.grad.isfinite().all() and p.grad.norm() <= 10 * before[name]


@pytest.mark.parametrize("rank", [1, 2])
def test_the_papers_epsilon_is_taken_as_it_is(rank: int) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), FloralConfig(target_modules=["0"], r=rank)).double()
    randomize(model)
    model(torch.randn(3, 5).double()).square().sum().backward()
    layer = model.base_model.model[0]
    b, gradient = layer.floral_B["default"].detach()[:, 2], layer.floral_A["default"].grad[2].clone()
    precondition_gradients(model, epsilon=1e-5)
    expected = torch.linalg.solve(b.T @ b + 1e-5 * torch.eye(rank).double(), gradient)
    torch.testing.assert_close(layer.floral_A["default"].grad[2], expected)
    with pytest.raises(ValueError, match=r"epsilon=0\.0 must be above 0"):
        precondition_gradients(model, epsilon=0.0)


def test_zero_factors_and_missing_gradients_do_no_harm() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), FloralConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0]
    precondition_gradients(model)  # no gradient at all
    with torch.no_grad():
        layer.floral_A["default"].zero_()
    layer.floral_B["default"].grad = torch.ones(3, 4, 2)
    precondition_gradients(model)
    assert torch.equal(layer.floral_B["default"].grad, torch.ones(3, 4, 2))
    assert layer.floral_A["default"].grad is None


@pytest.mark.parametrize("rank", [1, 3])
def test_half_precision_factors_are_solved_in_float32(rank: int) -> None:
    torch.manual_seed(0)
    config = FloralConfig(target_modules=["0"], r=rank)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)).bfloat16(), config, autocast_adapter_dtype=False)
    randomize(model)
    model(torch.randn(5, 4).bfloat16()).sum().backward()
    precondition_gradients(model)
    gradient = model.base_model.model[0].floral_A["default"].grad
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()


def trained(rank: int, split: str, missing: str | None) -> Any:
    """A model of two linear layers alike and a convolution, with gradients, but for those of one kind."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    config = FloralConfig(target_modules=["0", "2", "4"], num_adaptors=3, r=rank, conv_split=split)
    model: Any = get_peft_model(net, config).double()
    randomize(model)
    model(torch.randn(2, 2, 4, 4).double()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if missing is not None and missing in name:
            parameter.grad = None
    return model


@pytest.mark.parametrize("split", ["balanced_2d", "in"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("missing", [None, "floral_A", "floral_B"])
def test_steps_are_clipped_as_they_are_afterwards(rank: int, split: str, missing: str | None) -> None:
    plain, clipped, at_once = (trained(rank, split, missing) for _ in range(3))
    for model in (plain, clipped):
        precondition_gradients(model, epsilon=1e-3)
    limit = 0.4
    clip_steps(factor_pairs(clipped), limit)
    precondition_gradients(at_once, epsilon=1e-3, max_norm=limit)
    shortened = []
    for pairs in zip(*(factor_pairs(model) for model in (plain, clipped, at_once)), strict=True):
        for axis, (before, expected, found) in enumerate(zip(*pairs, strict=True)):
            assert (found.grad is None) == (missing == ("floral_A", "floral_B")[axis])
            if found.grad is not None:
                torch.testing.assert_close(found.grad, expected.grad)
                lengths = [gradient.movedim(axis, 0).flatten(1).norm(dim=1) for gradient in (found.grad, before.grad)]
                shortened += (lengths[0] / lengths[1]).tolist()
    assert min(shortened) < 0.9 < 0.999 < max(shortened)  # some adaptors' steps are long, some are not
    with pytest.raises(ValueError, match=r"max_norm=0\.0 must be above 0"):
        precondition_gradients(at_once, max_norm=0.0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_steps_are_as_long_as_allowed_where_a_gram_matrix_is_singular(scale: float) -> None:
    """A layer smaller than the rank in float32, with the paper's ε: 1/ε blows rounding up."""
    torch.manual_seed(0)
    a, b = torch.randn(6, 16, 200) / 14, scale * torch.randn(10, 6, 16)
    weight = torch.randn(6, 10, 200)  # the gradient of each adaptor's matrix
    a.grad, b.grad = torch.einsum("ocr,coi->cri", b, weight), torch.einsum("coi,cri->ocr", weight, a)
    precondition_gradients([(a, b)], epsilon=1e-5, max_norm=1.0)
    steps = torch.einsum("ocr,cri->coi", b.grad.double(), a.double())
    steps += torch.einsum("ocr,cri->coi", b.double(), a.grad.double())
    torch.testing.assert_close(steps.flatten(1).norm(dim=1), torch.ones(6).double(), rtol=1e-3, atol=0)
