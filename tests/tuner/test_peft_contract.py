"""FLORAL is a PEFT method like any other: saving, loading, merging, several adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_model_status
from safetensors.torch import load_file
from torch import nn

from floral_peft import FloralConfig

from .models import TOKENS, floral_llama, get_peft_model, tiny_llama
from .reference import randomize


X = torch.linspace(-1, 1, 20).view(5, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.lin(x))))


def floral_net(**config: Any) -> Any:
    settings: dict[str, Any] = {"target_modules": ["lin"], "num_clients": 3} | config
    model = get_peft_model(Net(), FloralConfig(**settings))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shared_r": 2, "router_per_layer": True, "adapt_bias": False},
        {"train_base": True},
        {"modules_to_save": ["head"]},
        {"train_base": True, "modules_to_save": ["head"], "client_names": ["a", "b", "../c"]},
    ],
)
def test_a_loaded_adapter_gives_the_same_outputs(
    config: dict[str, Any], low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = floral_net(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        if config.get("train_base"):
            model.base_model.model.norm.base_layer.running_mean.add_(0.5)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("adapter_model*")] == ["adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for client in config.get("client_names", range(3)):
        with model.client(client), loaded.client(client):
            assert torch.equal(model(X), loaded(X))


def test_a_trained_base_is_not_saved_with_a_clients_mixture_in_it(tmp_path: Path) -> None:
    model = floral_net(train_base=True)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)


def test_a_trained_base_is_saved_under_the_bare_models_names(tmp_path: Path) -> None:
    floral_net(train_base=True).save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    prefix = "base_model.model."
    bare = {key.removeprefix(prefix) for key in keys if "floral" not in key and "router" not in key}
    assert bare == set(Net().state_dict())
    assert "base_model.floral_router.logits" in keys


def test_a_frozen_base_is_not_saved(tmp_path: Path) -> None:
    floral_net().save_pretrained(tmp_path)
    assert {key.split(".")[-1] for key in load_file(tmp_path / "adapter_model.safetensors")} == {
        "floral_A", "floral_B", "floral_bias", "logits",
    }  # fmt: skip


def test_auto_model_finds_base_and_adapter(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = tiny_llama().from_pretrained(tmp_path / "base")
    model = get_peft_model(base, FloralConfig(num_clients=2, task_type="CAUSAL_LM"))
    assert model.targeted_module_names[0].endswith("q_proj")  # PEFT's default for the architecture
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded.set_client(1), model.set_client(1)
    torch.testing.assert_close(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def test_only_adaptors_and_router_train_unless_the_base_does() -> None:
    frozen = {name for name, p in floral_net().named_parameters() if p.requires_grad}
    assert all("floral_" in name or "router" in name for name in frozen) and len(frozen) == 4
    trained = floral_net(train_base=True)
    assert all(p.requires_grad for p in trained.parameters())
    loaded_for_inference = floral_net(train_base=True, inference_mode=True)
    assert not any(p.requires_grad for p in loaded_for_inference.parameters())


def test_disabling_gives_the_base_and_enabling_the_adapter() -> None:
    model = floral_net()
    adapted, base = model(X), Net().eval()(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base)
        assert torch.equal(model(X, client_ids=[0, 1, 2, 0, 1]), base)
        assert not model.base_model.router.logits["default"].requires_grad
    assert torch.equal(model(X), adapted)
    assert model.base_model.router.logits["default"].requires_grad


def test_merging_is_for_one_client_and_keeps_it() -> None:
    model = floral_net()
    model.set_client(2)
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected)
    for change in (
        lambda: model.set_client(1),
        lambda: model(X, client_ids=[0] * 5),
        lambda: model.set_routers(torch.zeros(1, 1, 4)),
        lambda: model.load_router_state_dict({"logits": torch.zeros(1, 4)}),
    ):
        with pytest.raises(ValueError, match="unmerge_adapter"):
            change()
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), expected)
    model.set_client([0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match="one client's mixture"):
        model.merge_adapter()


def test_a_broken_adapter_is_not_merged_safely() -> None:
    model = floral_net()
    before = model.base_model.model.lin.base_layer.weight.detach().clone()
    with torch.no_grad():
        model.base_model.model.lin.floral_A["default"].fill_(torch.inf)
    with pytest.raises(ValueError, match=r"NaNs detected.*default"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.lin.base_layer.weight, before)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, when it is adapted
def test_a_tied_embedding_is_adapted_alone_and_not_merged() -> None:
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), FloralConfig(target_modules=["embed_tokens"]))
    randomize(model)
    head, tokens = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    assert head.weight is tokens.base_layer.weight
    hidden = torch.randn(1, 2, 16)
    assert torch.equal(head(hidden), hidden @ tokens.base_layer.weight.T)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"model.embed_tokens .* shares its weight with lm_head.*tie_word_embeddings"
        ):
            merge()


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_leaves_a_plain_model(merge: bool) -> None:
    model = floral_net()
    expected = model(X) if merge else Net().eval()(X)
    plain = model.merge_and_unload() if merge else model.unload()
    assert type(plain) is Net and plain.state_dict().keys() == Net().state_dict().keys()
    assert not plain._forward_hooks and not plain._forward_pre_hooks
    torch.testing.assert_close(plain(X), expected)


def test_adapters_with_tables_of_their_own() -> None:
    model = floral_net()
    model.add_adapter("other", FloralConfig(target_modules=["lin", "head"], num_adaptors=2, r=3))
    logits = model.base_model.router.logits
    assert (logits["default"].shape, logits["other"].shape) == ((3, 1, 4), (1, 1, 2))
    assert logits["default"].requires_grad and not logits["other"].requires_grad
    model.set_client(2)
    model.set_adapter("other")
    assert model.mixture().shape == (2,)  # the client that "other" does not know is not selected any more
    assert logits["other"].requires_grad and not logits["default"].requires_grad
    status = get_model_status(model)
    assert (status.available_adapters, status.active_adapters) == (["default", "other"], ["other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert list(logits) == ["default"]
    assert not any("other" in name for name, _ in model.named_parameters())


def test_an_adapter_that_trains_the_base_tolerates_no_other() -> None:
    model = floral_net(train_base=True)
    with pytest.raises(ValueError, match="'default' trains the base"):
        model.add_adapter("other", FloralConfig(target_modules=["lin"]))


def test_a_copy_has_clients_of_its_own() -> None:
    model = floral_net()
    model.set_client(1)
    expected = model(X)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), expected)
    other.set_client(2)
    assert torch.equal(model(X), expected) and not torch.equal(other(X), expected)
    with torch.no_grad():
        other.base_model.router.logits["default"].zero_()
    assert torch.equal(model(X), expected)
    assert type(other.merge_and_unload()) is Net


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    model = get_peft_model(
        tiny_llama().to(dtype),
        FloralConfig(num_clients=4, target_modules=["q_proj", "v_proj"]),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    randomize(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.floral_A["default"].dtype == (torch.float32 if autocast_adapter_dtype else dtype)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert model.base_model.router.logits["default"].dtype == expected
    logits = model(TOKENS, client_ids=[0, 1, 2, 3]).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    logits.float().sum().backward()
    assert layer.floral_A["default"].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["stacked", "merged"])
def test_autocast(dtype: torch.dtype, compute: str) -> None:
    model = floral_llama(compute=compute, train_base=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert model.base_model.router.logits["default"].grad is not None
