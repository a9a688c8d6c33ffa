"""Batch norms of a base that trains: every adaptor normalises by running statistics of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from floral_peft import FloralConfig
from floral_peft.tuner import buffer_roles, center_adaptors, export_client, private_buffers, pure_losses
from floral_peft.tuner.layers import BatchNorm, Norm

from .models import get_peft_model
from .reference import randomize


X = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 2 + 1


def base() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


def net(own_scale: bool = False, **config: Any) -> Any:
    """Two adaptors, one of bright and one of dark images; client 0 uses the first, 1 the second, 2 and 3 mix them."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_adaptors": 2, "num_clients": 4, "target_modules": ["1"], "train_base": True}
    model = get_peft_model(base(), FloralConfig(**settings | ({"adapt_norms": True} if own_scale else {}) | config))
    randomize(model)
    norm = norm_of(model)
    with torch.no_grad():
        norm.base_layer.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        norm.base_layer.bias.copy_(torch.tensor([0.3, -1.0, 2.0]))
        norm.base_layer.running_mean.copy_(torch.tensor([0.5, -1.0, 0.0]))
        norm.base_layer.running_var.copy_(torch.tensor([1.0, 2.0, 0.5]))
        norm.floral_mean["default"].copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]))
        norm.floral_var["default"].copy_(torch.tensor([[4.0, 1.0, 1.0], [1.0, 0.5, 2.0]]))
    for client, logits in enumerate([[0.0, -1e4], [-1e4, 0.0], [0.0, 1.0], [2.0, 0.0]]):
        model.load_router_state_dict({"logits": torch.tensor([logits])}, client=client)
    return model.eval()


def norm_of(model: Any) -> Any:
    return model.base_model.model[0]


def expected(model: Any, client: int, x: Tensor = X) -> Tensor:
    """The scale of the client's mixture on x as each adaptor normalises it, mixed; and the mixture's shift."""
    norm = norm_of(model)
    main, pi = norm.base_layer, model.mixture(client)
    scale, shift = main.weight, main.bias
    if "default" in norm.floral_weight:
        scale = scale + pi @ norm.floral_weight["default"]
        shift = shift + pi @ norm.floral_bias["default"]
    normalised = torch.zeros_like(x)
    for c in range(2):
        sigma = (norm.floral_var["default"][c] + main.eps).sqrt().view(3, 1, 1)
        normalised = normalised + pi[c] * (x - norm.floral_mean["default"][c].view(3, 1, 1)) / sigma
    return scale.view(3, 1, 1) * normalised + shift.view(3, 1, 1)


@pytest.mark.parametrize("own_scale", [False, True])
def test_in_evaluation_an_adaptor_normalises_by_its_own_statistics(own_scale: bool) -> None:
    model = net(own_scale)
    assert isinstance(norm_of(model), BatchNorm)
    assert ("default" in norm_of(model).floral_weight) == own_scale
    for client in range(4):
        with model.client(client):
            torch.testing.assert_close(norm_of(model)(X), expected(model, client))
    rows = [3, 1, 0, 2, 2, 1, 0, 0, 3, 1, 2, 3]
    model.set_client(rows)
    each = torch.stack([expected(model, client)[row] for row, client in enumerate(rows)])
    torch.testing.assert_close(norm_of(model)(X), each)


def test_in_training_a_batch_is_normalised_by_its_own() -> None:
    model = net().train()
    with model.client(2):
        found = norm_of(model)(X)
    plain: Any = nn.BatchNorm2d(3)
    plain.load_state_dict(norm_of(net()).base_layer.state_dict())
    assert torch.equal(found, plain(X))
    assert torch.equal(norm_of(model).base_layer.running_mean, plain.running_mean)


def test_statistics_follow_the_batches_of_who_uses_an_adaptor() -> None:
    model = net()
    before = norm_of(model).floral_mean["default"].clone()
    batch, var = X.mean(dim=(0, 2, 3)), X.var(dim=(0, 2, 3))
    with model.train().client(0):
        model(X)
    mean = norm_of(model).floral_mean["default"]
    torch.testing.assert_close(mean[0], 0.9 * before[0] + 0.1 * batch)
    torch.testing.assert_close(
        norm_of(model).floral_var["default"][0], 0.9 * torch.tensor([4.0, 1.0, 1.0]) + 0.1 * var
    )
    assert torch.equal(mean[1], before[1])  # nobody used it
    model = net()
    with model.train().client(2):  # π = (.27, .73): the one that it uses most follows as the main ones do
        model(X)
    share = float(torch.tensor(-1.0).exp())
    mean = norm_of(model).floral_mean["default"]
    torch.testing.assert_close(mean[1], 0.9 * before[1] + 0.1 * batch)
    torch.testing.assert_close(mean[0], (1 - 0.1 * share) * before[0] + 0.1 * share * batch)


def test_a_pretrained_model_starts_undisturbed() -> None:
    plain = base().train()
    for _ in range(3):
        plain(X)
    plain.eval()
    wanted = plain(X)
    model = get_peft_model(plain, FloralConfig(num_adaptors=3, target_modules=["1"], train_base=True)).eval()
    torch.testing.assert_close(model(X), wanted)


def test_pure_models_use_their_adaptors_statistics() -> None:
    model = net()
    (losses,) = pure_losses(model, lambda x: model(x).square().mean(), [X])
    for c in range(2):
        with model.client(c):
            torch.testing.assert_close(losses[c], model(X).square().mean())
    assert float((losses[0] - losses[1]).abs()) > 0.1


def test_only_a_base_that_trains_has_them_and_exclude_modules_takes_them_away() -> None:
    frozen = get_peft_model(base(), FloralConfig(target_modules=["1"]))
    assert isinstance(frozen.base_model.model[0], nn.BatchNorm2d)
    excluded = get_peft_model(base(), FloralConfig(target_modules=["1"], exclude_modules=["0"], train_base=True))
    assert isinstance(excluded.base_model.model[0], nn.BatchNorm2d)
    named = get_peft_model(base(), FloralConfig(target_modules=["0", "1"], train_base=True)).base_model.model[0]
    assert isinstance(named, BatchNorm) and "default" in named.floral_weight
    untracked = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    plain = get_peft_model(untracked, FloralConfig(target_modules=["1"], train_base=True)).base_model.model[0]
    assert not isinstance(plain, Norm)


def test_they_are_the_adaptors_and_not_private() -> None:
    model = net()
    roles = buffer_roles(model)
    for factor in ("mean", "var"):
        role = roles[f"base_model.model.0.floral_{factor}.default"]
        assert (role.kind, role.axis, role.factor, role.layer) == ("adaptor", 0, factor, "base_model.model.0")
    assert roles["base_model.model.0.base_layer.running_mean"].kind == "base"
    assert private_buffers(model) == []


@pytest.mark.parametrize("own_scale", [False, True])
def test_merging_adds_what_it_takes_away(own_scale: bool) -> None:
    model = net(own_scale)
    model.set_client(3)
    before, wanted = norm_of(model).base_layer.weight.clone(), model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), wanted)
    assert not torch.equal(norm_of(model).base_layer.weight, before)
    norm_of(model).floral_mean["default"].add_(1.0)  # of no account: what was added is taken away
    model.unmerge_adapter()
    torch.testing.assert_close(norm_of(model).base_layer.weight, before)
    norm_of(model).floral_mean["default"].sub_(1.0)
    torch.testing.assert_close(model(X), wanted)
    torch.testing.assert_close(model.merge_and_unload()(X), wanted)


def test_a_merge_that_fails_changes_nothing() -> None:
    model = net()
    good = norm_of(model).floral_var["default"].clone()
    norm_of(model).floral_var["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs"):
        norm_of(model).merge(safe_merge=True)
    norm_of(model).floral_var["default"].copy_(good)
    torch.testing.assert_close(norm_of(model)(X), expected(model, 0))


def test_they_are_saved_and_exported(tmp_path: Path) -> None:
    model = net()
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    for client in range(4):
        model.set_client(client)
        loaded.set_client(client)
        torch.testing.assert_close(loaded(X), model(X))
    export_client(model, tmp_path / "lora", client=2, kind="lora")
    plain = base()
    plain.load_state_dict(load_file(tmp_path / "lora" / "base_model" / "model.safetensors"))
    with model.client(2):
        torch.testing.assert_close(PeftModel.from_pretrained(plain, str(tmp_path / "lora")).eval()(X), model(X))
    export_client(model, tmp_path / "merged", client=2)
    plain = base()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    with model.client(2):
        torch.testing.assert_close(plain.eval()(X), model(X))


def test_adaptors_go_come_and_become_one_with_their_statistics() -> None:
    model = net()
    inside = model.base_model
    mean = norm_of(model).floral_mean["default"].clone()
    inside.make_room(4)
    assert torch.equal(norm_of(model).floral_mean["default"], mean[[0, 1, 0, 1]])
    inside.keep_adaptors([1, 0])
    assert torch.equal(norm_of(model).floral_mean["default"], mean[[1, 0]])
    with model.client(0):
        torch.testing.assert_close(norm_of(model)(X), expected(model, 0))
    inside.pool(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(norm_of(model).floral_mean["default"], (0.75 * mean[1] + 0.25 * mean[0])[None])


@pytest.mark.parametrize("own_scale", [False, True])
def test_centering_changes_no_output(own_scale: bool) -> None:
    model = net(own_scale, r=8)
    before = [model(X) for client in range(4) if model.set_client(client) is None]
    center_adaptors(model, torch.tensor([0.3, 0.7]))
    after = [model(X) for client in range(4) if model.set_client(client) is None]
    torch.testing.assert_close(after, before)


def test_a_kept_norm_notices_that_statistics_have_moved() -> None:
    model = net()
    with torch.no_grad():
        norm_of(model)(X)
        norm_of(model).floral_mean["default"].add_(3.0)
        torch.testing.assert_close(norm_of(model)(X), expected(model, 0))


def test_layers_that_are_no_plain_batch_norms_stay_what_they_are() -> None:
    class Activated(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return torch.relu(super().forward(input))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.one = nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.other(self.linear(self.one(x)))
            return found

    x = torch.randn(6, 3)
    for left in (Activated(3), nn.BatchNorm1d(3, affine=False)):
        model = get_peft_model(
            nn.Sequential(left, nn.Linear(3, 2)), FloralConfig(target_modules=["1"], train_base=True)
        )
        assert model.base_model.model[0] is left
    twice = get_peft_model(Twice(), FloralConfig(target_modules=["linear"], train_base=True, num_clients=2)).train()
    randomize(twice)
    twice(x)
    twice.eval()
    wanted = twice(x)
    twice.merge_adapter()
    torch.testing.assert_close(twice(x), wanted)


def test_who_loads_the_main_statistics_alone_gives_them_to_the_adaptors(tmp_path: Path) -> None:
    model = net()
    model.save_pretrained(str(tmp_path))
    held = load_file(tmp_path / "adapter_model.safetensors")
    older = {name: value for name, value in held.items() if "floral_mean" not in name and "floral_var" not in name}
    save_file(older, tmp_path / "adapter_model.safetensors")
    loaded: Any = PeftModel.from_pretrained(base(), str(tmp_path))
    assert torch.equal(norm_of(loaded).floral_mean["default"], torch.tensor([[0.5, -1.0, 0.0]] * 2))
    assert torch.equal(norm_of(loaded).floral_var["default"], torch.tensor([[1.0, 2.0, 0.5]] * 2))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(norm_of(loaded).floral_mean["default"], norm_of(model).floral_mean["default"])
