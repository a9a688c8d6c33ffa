"""Budgets, kernel splits and starts, against their formulas and the paper's parameter counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from floral_peft import FloralConfig
from floral_peft.tuner.rank import init_factors, kernel_split, rank_of_budget

from .models import get_peft_model


@pytest.mark.parametrize(
    ("budget", "numel", "per_rank", "expected"),
    [
        (0.01, 784 * 200, 984, 1),  # ⌊1.59⌋
        (0.1, 784 * 200, 984, 15),  # ⌊15.9⌋
        (0.01, 2000, 210, 1),  # ⌊0.095⌋, but at least 1
        (1.0, 64, 16, 4),
        (0.1, 30 * 7, 7, 3),  # exactly 3, though 0.1 is not a binary fraction
    ],
)
def test_a_budget_buys_the_largest_rank_that_fits(budget: float, numel: int, per_rank: int, expected: int) -> None:
    assert rank_of_budget(budget, numel, per_rank) == expected


def test_the_minimum_rank_holds_whatever_the_budget() -> None:
    assert rank_of_budget(0.01, 2000, 210, min_rank=4) == 4


def mnist_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def cifar_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(3),
        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("net", "targets", "base", "extra_percent"),
    [
        (mnist_net, ["1", "3"], 159_010, {0.01: 3.5, 0.1: 38}),
        (cifar_net, ["0", "3", "7", "9"], 87_178, {0.01: 8.2, 0.1: 40}),
    ],
)
def test_the_extra_parameters_are_the_papers(
    net: type, targets: list[str], base: int, extra_percent: dict[float, float]
) -> None:
    for budget, percent in extra_percent.items():
        model = net()
        assert sum(p.numel() for p in model.parameters()) == base
        adapted = get_peft_model(model, FloralConfig(num_adaptors=4, budget=budget, target_modules=targets))
        extra = sum(p.numel() for name, p in adapted.named_parameters() if "floral_" in name)
        assert 100 * extra / base == pytest.approx(percent, abs=0.5)


@pytest.mark.parametrize(
    ("split", "channels", "kernel", "first"),
    [
        ("in", (4, 8), (3, 3), (True, True)),
        ("out", (4, 8), (3, 3), (False, False)),
        ("linear", (4, 8), (3, 3), (False, False)),
        ("balanced", (4, 8), (3, 3), (True, True)),
        ("balanced", (8, 4), (3, 3), (False, False)),
        ("balanced_2d", (4, 8), (3, 3), (False, True)),  # conv 1×3, then conv 3×1
        ("balanced_2d", (8, 4), (3, 3), (False, True)),
        ("balanced_2d", (4, 8), (3, 5), (False, True)),  # the larger axis where channels are fewer
        ("balanced_2d", (8, 4), (3, 5), (True, False)),
        ("balanced_2d", (4, 8), (5, 3), (True, False)),
        ("balanced_2d", (8, 4), (5, 3), (False, True)),
        ("balanced_2d", (4, 8), (3, 1), (True, True)),
        ("balanced_2d", (8, 4), (3, 1), (False, True)),
        ("balanced_2d", (4, 8), (1, 1), (True, True)),
        ("balanced_2d", (4, 4), (3, 3, 3), (False, False, True)),
    ],
)
def test_kernel_axes_are_dealt_out(
    split: str, channels: tuple[int, int], kernel: tuple[int, ...], first: tuple[bool, ...]
) -> None:
    assert kernel_split(split, *channels, kernel) == first


def test_a_start_is_uniform_and_zero() -> None:
    a, b, bias = torch.empty(4, 8, 600), torch.empty(5, 4, 8), torch.ones(4, 5)
    init_factors(a, b, bias, fan_in=600, identity=True, std=0.0)
    assert not b.any() and not bias.any()
    assert 0.099 < float(a.max()) <= 0.1 and -0.1 <= float(a.min()) < -0.099  # √(6/600) = 0.1


@pytest.mark.parametrize(("layer", "bound"), [(nn.Linear(6, 600), 1 / 2), (nn.Conv2d(6, 600, 3), 1 / (4 * 3) ** 0.5)])
def test_init_bias_starts_biases_as_torch_does_those_of_the_second_factor_s_layer(
    layer: nn.Module, bound: float
) -> None:
    torch.manual_seed(0)
    config = FloralConfig(target_modules=["0"], r=4, shared_r=2, init_bias=2.0)
    adapted = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    bias = adapted.floral_bias["default"]
    assert bias.shape == (4, 600) and 1.98 * bound < float(bias.detach().abs().max()) <= 2 * bound
    assert float((bias[0] - bias[1]).detach().abs().mean()) > 0.5 * bound  # each adaptor has its own
    assert not adapted.floral_B["default"].any() and not adapted.floral_shared_bias["default"].any()


def test_rank_and_alpha_patterns_override() -> None:
    config = FloralConfig(target_modules=["1", "3"], budget=0.1, rank_pattern={"3": 5}, alpha_pattern={"1": 3.0})
    model = get_peft_model(mnist_net(), config)
    first, second = model.base_model.model[1], model.base_model.model[3]
    assert (first.r["default"], second.r["default"]) == (15, 5)
    assert (first.scaling["default"], second.scaling["default"]) == (3.0, 1.0)
