"""What a hostile review of the layers found: each is right now, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from floral_peft import FloralConfig
from floral_peft.tuner import center_adaptors, precondition_gradients

from .models import get_peft_model, tiny_llama
from .reference import randomize


def adapt(base: nn.Module, **config: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base, FloralConfig(num_adaptors=3, **{"r": 2, "init_weights": False, **config}))
    randomize(model)
    return model


class Two(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


# Passes


def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    def stop(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = adapt(Two(stop), target_modules=["a"], num_clients=3)
    layer = model.base_model.model.a
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 8))
    model.set_client(2)
    expected = torch.einsum("c,ocr,cri->oi", model.mixture(2), layer.floral_B["default"], layer.floral_A["default"])
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_a_pass_within_a_pass_keeps_both_clients() -> None:
    model = adapt(Two(lambda x: x), target_modules=["a", "b"], num_clients=3)
    x = torch.randn(2, 8)
    one, two = model(x, client_ids=[1]), model(x, client_ids=[2])
    inner: list[Tensor] = []

    def between(hidden: Tensor) -> Tensor:
        model.base_model.model.between = lambda x: x
        inner.append(model(x, client_ids=[2]))
        return hidden

    model.base_model.model.between = between
    torch.testing.assert_close(model(x, client_ids=[1]), one)
    torch.testing.assert_close(inner[0], two)


class Opaque:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Checkpointed(nn.Module):
    """Returns an object that only it knows."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.a, self.b, self.checkpointed = nn.Linear(8, 8), nn.Linear(8, 8), checkpointed

    def forward(self, x: Tensor) -> Opaque:
        def block(x: Tensor) -> Tensor:
            return torch.tanh(self.b(x))

        hidden = self.a(x)
        return Opaque(checkpoint(block, hidden, use_reentrant=False) if self.checkpointed else block(hidden))


def test_checkpoints_within_an_opaque_output_keep_their_client() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = adapt(Checkpointed(checkpointed), target_modules=["a", "b"], num_clients=3)
        model(torch.ones(4, 8), client_ids=[1]).hidden.square().sum().backward()
        gradients.append(model.router.logits["default"].grad)
    torch.testing.assert_close(gradients[1], gradients[0])


# One operation for a layer


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 4)])
def test_inputs_without_rows_pass(shape: tuple[int, ...]) -> None:
    model = adapt(nn.Sequential(nn.Linear(4, 5)), target_modules=["0"])
    assert model(torch.zeros(shape)).shape == (*shape[:-1], 5)


def test_backward_may_run_within_autocast() -> None:
    def outside(x: Tensor) -> Tensor:
        return x.float()

    model = adapt(Two(outside), target_modules=["a", "b"])
    inner = model.base_model.model.b
    forward = inner.forward

    def island(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x)

    inner.forward = island
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 8)).sum().backward()
    assert inner.floral_A["default"].grad.dtype == torch.float32


def test_hooks_of_the_base_layer_and_its_replaced_forward_are_called() -> None:
    called: list[str] = []

    class Hook(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.append("forward")
            return args, kwargs

    base = nn.Sequential(nn.Linear(4, 4))
    add_hook_to_module(base[0], Hook())
    base[0].register_full_backward_hook(lambda *_: called.append("backward"))
    adapt(base, target_modules=["0"])(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert called == ["forward", "backward"]


def test_training_the_router_alone_keeps_no_input() -> None:
    model = adapt(nn.Sequential(nn.Linear(64, 64)), target_modules=["0"], compute="stacked")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("logits" in name)
    with torch.inference_mode():
        x = torch.randn(3, 64)  # may not be kept
    model(x).sum().backward()
    assert model.router.logits["default"].grad is not None


# Merged weights that are kept


def test_a_weight_that_was_merged_under_autocast_is_not_used_outside() -> None:
    model = adapt(nn.Sequential(nn.Conv2d(3, 4, 3)), target_modules=["0"]).eval()
    x = torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        torch.testing.assert_close(model(x), expected)


def test_vmap_works_in_evaluation_without_gradients() -> None:
    model = adapt(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"]).eval()
    (name,) = (name for name, _ in model.named_parameters() if "logits" in name)
    x, logits = torch.randn(2, 4), torch.randn(5, 1, 1, 3)
    with torch.no_grad():
        found = vmap(lambda own: functional_call(model, {name: own}, (x,)))(logits)
        for row, own in zip(found, logits, strict=True):
            torch.testing.assert_close(row, functional_call(model, {name: own}, (x,)))


# Batch norm with statistics of its own


def batch_norm(compute: str = "auto", **config: Any) -> Any:
    base = nn.Sequential(nn.BatchNorm1d(4))
    return adapt(base, target_modules=["0"], adapt_norms="reparametrized", compute=compute, **config).double().train()


def test_all_paths_of_a_reparametrised_batch_norm_use_the_statistics_before_the_step() -> None:
    first = batch_norm("merged", num_clients=2)
    for step in range(3):
        first(torch.randn(16, 4).double() * (step + 1) + step)
    state, x = {name: value.clone() for name, value in first.state_dict().items()}, torch.randn(16, 4).double()
    expected = first(x)
    for compute, clients in (("stacked", None), ("merged", torch.zeros(16, dtype=torch.long))):
        other = batch_norm(compute, num_clients=2)
        other.load_state_dict(state)
        torch.testing.assert_close(other(x, client_ids=clients), expected, rtol=1e-10, atol=1e-10)


def test_a_kept_norm_follows_its_adaptors_statistics() -> None:
    model = batch_norm()
    for step in range(3):
        model(torch.randn(16, 4).double() * 2 + step)
    x = torch.randn(3, 4).double()
    with torch.no_grad():
        model.eval()(x)
        model.base_model.model[0].floral_mean["default"].add_(3.0)
        changed = model(x)
        torch.testing.assert_close(changed, model.eval()(x))


def test_a_reparametrised_batch_norm_refuses_to_be_checkpointed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: F.relu(self.norm(self.linear(x))), x, use_reentrant=False)

    model = adapt(Net(), target_modules=["linear"], adapt_norms="reparametrized").train()
    output = model(torch.randn(8, 4))
    with pytest.raises(RuntimeError, match=r"norm is recomputed .* adapt_norms=True"):
        output.sum().backward()


# Centering


def test_centering_a_reparametrised_batch_norm_changes_no_output() -> None:
    model = batch_norm(train_base=True, num_clients=3)
    for client in range(3):
        model.set_client(client)
        for _ in range(20):
            model(torch.randn(16, 4).double() * (client + 1) + client)
    model.eval()
    x = torch.randn(16, 4).double()
    with torch.no_grad():
        before = model(x)
        assert center_adaptors(model, torch.tensor([0.2, 0.5, 0.3])) == {"0": 0.0}
        torch.testing.assert_close(model(x), before)


def test_centering_refuses_tied_and_merged_weights() -> None:
    llama = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        tied = adapt(llama, target_modules=["embed_tokens"], train_base=True)
    with pytest.raises(ValueError, match=r"embed_tokens shares its weight with .*lm_head"):
        center_adaptors(tied, torch.ones(3))
    merged = adapt(nn.Sequential(nn.Linear(6, 6)), target_modules=["0"], train_base=True)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        center_adaptors(merged, torch.ones(3))


def test_centering_reports_what_a_half_precision_base_loses() -> None:
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    model = adapt(base, target_modules=["0"], train_base=True, r=64, alpha=1e-2)
    layer = model.base_model.model[0]

    def weight() -> Tensor:
        return layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()

    with torch.no_grad():
        size, before = layer.get_delta_weight("default").norm(), weight()
        report = center_adaptors(model, torch.ones(3))
        lost = float((weight() - before).norm() / size)
    assert 1e-3 < lost < 1.1 * report["0"]


def test_centering_takes_only_weights_of_the_shape_it_says() -> None:
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = adapt(layers, target_modules=["0", "1"], train_base=True)
    with pytest.raises(ValueError, match="router_per_layer"):
        center_adaptors(model, torch.rand(2, 3))


# Layers of a special kind


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}, {"padding_idx": 0}]
)
def test_paths_agree_for_every_kind_of_embedding(options: dict[str, Any]) -> None:
    found = []
    for compute in ("stacked", "merged"):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Embedding(10, 6, **options)).double()
        config = FloralConfig(num_adaptors=3, r=2, init_std=0.3, target_modules=["0"], compute=compute)
        model = get_peft_model(base, config).double()
        output = model(torch.tensor([[1, 2, 2, 3], [2, 5, 0, 1]]))
        output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_positions_of_one_dimension_are_refused_for_a_batch_of_clients() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(16, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))

    model = adapt(Positions(), target_modules=["positions"], num_clients=3)
    with pytest.raises(ValueError, match=r"positions: 4 clients [\s\S]*exclude_modules"):
        model(torch.randint(0, 11, (4, 8)), client_ids=[0, 1, 2, 1])


def test_adaptors_in_torchs_encoder_layer_count_in_evaluation() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1)
    model = adapt(encoder, target_modules=["linear1", "linear2"])
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model.eval()(x), model.train()(x))


def test_damping_must_be_above_zero() -> None:
    model = adapt(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    model(torch.randn(2, 4)).sum().backward()
    for damping in (0.0, -1.0):
        with pytest.raises(ValueError, match="damping"):
            precondition_gradients(model, damping)
