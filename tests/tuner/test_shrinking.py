"""Fewer adaptors and lower ranks: the tensors shrink, in the model and in what it saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from floral_peft import FloralConfig

from .models import get_peft_model
from .reference import adaptor_weight, randomize, relative_error


IDS = torch.arange(2 * 48).view(2, 48) % 7


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 6, padding_idx=0),
        nn.Unflatten(1, (6, 8)),
        nn.Flatten(2),
        nn.Unflatten(2, (6, 8)),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 8),
        nn.Linear(8, 5),
    )


FACTORED = {"0", "4", "8", "9"}


def net(**config: Any) -> Any:
    settings: dict[str, Any] = {
        "target_modules": sorted(FACTORED),
        "num_clients": 3,
        "alpha": 1.5,
        "num_adaptors": 4,
        "r": 3,
        "adapt_norms": "reparametrized",
    }
    model = get_peft_model(base(), FloralConfig(**settings | config))
    randomize(model)
    return model.double().eval()


def outputs(model: Any) -> Tensor:
    rows = []
    for client in range(3):
        with model.client(client):
            rows.append(model(IDS).detach())
    return torch.stack(rows)


def saved(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base().double(), folder).eval()


@pytest.mark.parametrize("config", [{}, {"router_per_layer": True, "router_temperature": 2.0}, {"shared_r": 2}])
def test_unused_adaptors_can_go_without_a_trace(config: dict[str, Any], tmp_path: Any) -> None:
    model = net(**config)
    table = model.base_model.router.logits["default"]
    with torch.no_grad():
        table[..., [0, 2]] = -1e4
    expected, held = outputs(model), sum(p.numel() for p in model.parameters())
    model.keep_adaptors([3, 1])
    assert relative_error(outputs(model), expected) < 1e-12
    assert model.mixture(0).shape[-1] == model.num_adaptors == 2
    assert model.active_peft_config.num_adaptors == 2
    per_adaptor = sum(p.numel() // 2 for n, p in model.named_parameters() if "floral_" in n and "shared" not in n)
    assert held - sum(p.numel() for p in model.parameters()) == 2 * per_adaptor
    assert all(p.requires_grad for n, p in model.named_parameters() if "floral_" in n)
    assert torch.equal(outputs(saved(model, tmp_path)), outputs(model))


def test_dead_weight_is_shared_out_in_proportion() -> None:
    model = net()
    before = model.mixture(1)
    model.keep_adaptors(torch.tensor([0, 2, 3]))
    torch.testing.assert_close(model.mixture(1), before[[0, 2, 3]] / before[[0, 2, 3]].sum())


def test_what_is_left_trains_on_with_a_new_optimiser() -> None:
    model = net(train_base=True).train()
    model.keep_adaptors([2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(IDS).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters() if "_B" in name)


def test_the_only_adaptor_left_needs_no_router() -> None:
    model = net(router_top_k=2)
    model.keep_adaptors([1])
    assert model.mixture(2).tolist() == [1.0]
    assert not model.base_model.router.logits["default"].requires_grad
    assert model.active_peft_config.router_top_k == model.base_model.router.settings["default"].top_k == 1
    model.merge_and_unload()


def test_other_adapters_keep_theirs() -> None:
    model = net(adapt_norms=False)
    model.add_adapter("other", FloralConfig(target_modules=["8"], num_adaptors=3, r=2, init_weights=False))
    model.set_adapter("other")
    expected = model(IDS)
    model.base_model.keep_adaptors([0, 3], "default")
    assert torch.equal(model(IDS), expected)
    layer = model.base_model.model[8]
    assert [len(layer.floral_A[name]) for name in ("default", "other")] == [2, 3]
    assert model.peft_config["other"].num_adaptors == 3
    model.base_model.keep_adaptors([0])
    assert [len(layer.floral_A[name]) for name in ("default", "other")] == [2, 1]


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ([], ValueError, "at least one adaptor"),
        ([1, 1], ValueError, "each once"),
        ([4], ValueError, "no adaptor 4: the adapter has 4, 0 to 3"),
        ([-1], ValueError, "no adaptor -1"),
        ([True], TypeError, "by their numbers"),
        ([0.0], TypeError, "by their numbers"),
    ],
)
def test_what_cannot_be_kept_is_refused(kept: list[Any], error: type[Exception], message: str) -> None:
    model = net()
    expected = outputs(model)
    with pytest.raises(error, match=message):
        model.keep_adaptors(kept)
    assert torch.equal(outputs(model), expected)
    with pytest.raises(ValueError, match="no adapter 'else'"):
        model.keep_adaptors([0], "else")


def test_a_merged_model_shrinks_only_once_it_is_unmerged() -> None:
    model = net(adapt_norms=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"remove adaptors.*unmerge_adapter"):
        model.keep_adaptors([0])
    with pytest.raises(ValueError, match=r"compress.*unmerge_adapter"):
        model.compress(r=1)


@pytest.mark.parametrize("conv_split", ["balanced_2d", "in", "out"])
@pytest.mark.parametrize("train_base", [False, True])
def test_no_output_changes_where_the_rank_was_not_used(conv_split: str, train_base: bool, tmp_path: Any) -> None:
    model = net(conv_split=conv_split, train_base=train_base)
    with torch.no_grad():
        for name in FACTORED:
            model.base_model.model[int(name)].floral_A["default"][:, 2:] = 0
    expected = outputs(model)
    lost = model.compress(r=2)
    assert lost.keys() == FACTORED and max(lost.values()) < 1e-7
    assert relative_error(outputs(model), expected) < 1e-12
    layers = [model.base_model.model[int(name)] for name in FACTORED]
    assert {layer.floral_A["default"].shape[1] for layer in layers} == {2}
    assert {layer.floral_B["default"].shape[2] for layer in layers} == {2}
    config = model.active_peft_config
    assert (config.r, config.budget, config.rank_pattern) == (2, None, {})
    assert torch.equal(outputs(saved(model, tmp_path)), outputs(model))


def test_padding_stays_zero() -> None:
    model = net()
    table = model.base_model.model[0].floral_A["default"]
    with torch.no_grad():
        table[:, :, 0] = 0
    model.compress(r=2)
    assert not model.base_model.model[0].floral_A["default"][:, :, 0].any()


def test_what_is_cut_off_is_told() -> None:
    model = net()
    layer = model.base_model.model[8]
    before = [adaptor_weight(layer, "default", c) for c in range(4)]
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0])
    lost = model.compress(r=1, weights=weights)
    after = [adaptor_weight(layer, "default", c) for c in range(4)]
    gone = sum(w * (x - y).square().sum() for w, x, y in zip(weights, before, after, strict=True))
    whole = sum(w * x.square().sum() for w, x in zip(weights, before, strict=True))
    assert lost["8"] == pytest.approx(float((gone / whole).sqrt()))
    u, s, v = torch.linalg.svd(before[1], full_matrices=False)
    torch.testing.assert_close(after[1], s[0] * torch.outer(u[:, 0], v[0]))


def test_a_trained_base_takes_what_adaptors_have_in_common_where_that_loses_less() -> None:
    """Of four adaptors that differ from a common matrix by rank one, rank one is enough."""
    model = net(train_base=True)
    with torch.no_grad():
        layer = model.base_model.model[8]
        layer.floral_A["default"][:, :2] = layer.floral_A["default"][:1, :2]
        layer.floral_B["default"][:, :, :2] = layer.floral_B["default"][:, :1, :2]
        layer.floral_A["default"][:, 2] = layer.floral_A["default"][:1, 2]  # and the third by its second factor
        apart = model.base_model.model[9]  # of four that share nothing, each is of rank one as it is
        apart.floral_A["default"][:, 1:] = 0
        bases = [model.base_model.model[i].base_layer.weight.clone() for i in (8, 9)]
    expected = outputs(model)
    lost = model.compress(r=1)
    assert lost["8"] < 1e-7 and lost["9"] < 1e-7 < lost["4"]
    assert not torch.equal(layer.base_layer.weight, bases[0]) and torch.equal(apart.base_layer.weight, bases[1])
    assert relative_error(outputs(model), expected) < 1.0


def test_a_budget_gives_each_layer_its_rank_and_smaller_ones_stay(tmp_path: Any) -> None:
    model = net(r=6, rank_pattern={"8": 1})
    model.compress(budget=0.5)
    fresh = net(budget=0.5)
    ranks = {name: model.base_model.model[int(name)].r["default"] for name in FACTORED}
    given = {name: fresh.base_model.model[int(name)].r["default"] for name in FACTORED}
    assert ranks == given | {"8": 1} and max(given.values()) <= 6 and given["8"] > 1
    assert model.active_peft_config.rank_pattern == {"^8": 1}
    assert torch.equal(outputs(saved(model, tmp_path)), outputs(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a rank or a budget"),
        ({"r": 2, "budget": 0.1}, "a rank or a budget"),
        ({"r": 0}, "FloralConfig.r=0"),
        ({"budget": 2.0}, "FloralConfig.budget"),
        ({"r": 1, "weights": torch.ones(3)}, "must be 4 numbers"),
    ],
)
def test_what_cannot_be_compressed_is_left_alone(arguments: dict[str, Any], message: str) -> None:
    model = net()
    expected = outputs(model)
    with pytest.raises(ValueError, match=message):
        model.compress(**arguments)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.1, 0.2, 0.0, 0.7])])
def test_pooled_adaptors_are_the_mean_of_all(weights: Any) -> None:
    model = net(r=1, adapt_norms=True)
    former = model.base_model.widen(4, seed=1)  # so that the mean of four adaptors of rank 1 is one of rank 4
    before = model.active_peft_config.to_dict() | {"num_adaptors": 1}
    mixture = torch.full((4,), 0.25) if weights is None else weights / weights.sum()
    model.set_routers(mixture.clamp(min=1e-30).log().expand(3, 1, 4))
    expected = outputs(model)
    lost = model.base_model.pool(weights)
    assert lost.keys() == FACTORED and max(lost.values()) < 1e-6
    assert model.active_peft_config.to_dict() == before
    assert torch.allclose(outputs(model), expected, atol=1e-6)
    assert model.mixture(1).tolist() == [1.0]
    assert former.r == 1


def test_pooled_adaptors_get_the_rank_that_they_are_to_have() -> None:
    model = net(r=2)
    former = model.base_model.widen(5, seed=1)
    lost = model.base_model.pool(ranks=former)
    assert model.active_peft_config.r == 2
    assert {value.shape[1] for name, value in model.named_parameters() if "floral_A" in name} == {2}
    assert all(0 < value < 1 for value in lost.values())
