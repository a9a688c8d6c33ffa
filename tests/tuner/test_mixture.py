"""The layers against an independent float64 computation, by every compute path."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from floral_peft import FloralConfig
from floral_peft.tuner.fused import MergedLinear, StackedLinear
from floral_peft.tuner.fused_conv import FusedConv, Stage, conv_by_example
from floral_peft.tuner.layers import conv

from .models import get_peft_model
from .reference import mixed_layer, randomize, relative_error


# float32 rounding of a few thousand additions; the reference is float64
TOLERANCE = 1e-6

CONVOLUTIONS: dict[str, Any] = {
    "3x3": {"kernel_size": 3},
    "strided, padded": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "non-square": {"kernel_size": (3, 5), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    "tall": {"kernel_size": (5, 1), "padding": (2, 0)},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "even, same": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular, same": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    "replicate": {"kernel_size": (3, 5), "padding": (1, 2), "stride": 2, "padding_mode": "replicate"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "no bias": {"kernel_size": 3, "bias": False},
}


def adapt(layer: nn.Module, **config: Any) -> Any:
    model = get_peft_model(
        nn.Sequential(layer), FloralConfig(target_modules=["0"], num_adaptors=3, num_clients=5, **config)
    )
    randomize(model)
    return model


def assert_agrees(model: Any, x: Tensor, scale: float = 1.0) -> None:
    """One client, several clients, merged: all equal the reference."""
    layer = model.base_model.model[0]
    given = x.double() if x.is_floating_point() else x
    expected = [mixed_layer(layer, "default", model.mixture(k), scale)(given) for k in range(5)]
    for client in range(5):
        with model.client(client):
            assert relative_error(model(x), expected[client]) < TOLERANCE
            with torch.no_grad():
                for _ in range(3):  # in evaluation the weight is merged once it pays
                    assert relative_error(model.eval()(x), expected[client]) < TOLERANCE
            model.train()
    clients = [4, 0, 2, 2, 1, 3][: len(x)]
    mixed = torch.stack([expected[client][row] for row, client in enumerate(clients)])
    assert relative_error(model(x, client_ids=torch.tensor(clients)), mixed) < TOLERANCE
    model.set_client(3)
    before = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter()
    assert relative_error(model(x), expected[3]) < TOLERANCE
    model.unmerge_adapter()
    assert relative_error(layer.get_base_layer().weight, before) < TOLERANCE
    assert relative_error(model.merge_and_unload()(x), expected[3]) < TOLERANCE


@pytest.mark.parametrize("compute", ["stacked", "merged", "auto"])
@pytest.mark.parametrize("shared_r", [0, 2])
@pytest.mark.parametrize("adapt_bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 12), (6, 7, 12)])
def test_linear_equals_the_reference(compute: str, shared_r: int, adapt_bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = adapt(nn.Linear(12, 9), r=2, compute=compute, shared_r=shared_r, adapt_bias=adapt_bias, alpha=1.7)
    assert_agrees(model, torch.randn(shape), scale=1.7)


@pytest.mark.parametrize("compute", ["stacked", "merged"])
@pytest.mark.parametrize("split", ["balanced_2d", "balanced", "in", "out", "linear"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")  # torch's, about the base
def test_conv2d_equals_the_reference(compute: str, split: str, kind: str) -> None:
    torch.manual_seed(0)
    model = adapt(nn.Conv2d(4, 8, **CONVOLUTIONS[kind]), r=2, compute=compute, conv_split=split, shared_r=1, alpha=0.5)
    assert_agrees(model, torch.randn(6, 4, 11, 12), scale=0.5)


@pytest.mark.parametrize("split", ["balanced_2d", "balanced", "in", "out", "linear"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 4, 5, stride=2, padding=3, groups=2), (6, 6, 17)),
        (nn.Conv3d(2, 4, (3, 2, 5), padding=(1, 0, 2), stride=(1, 2, 1)), (6, 2, 6, 7, 8)),
    ],
    ids=["Conv1d", "Conv3d"],
)
@pytest.mark.parametrize("compute", ["stacked", "merged"])
def test_other_convolutions_equal_the_reference(
    layer: nn.Module, shape: tuple[int, ...], split: str, compute: str
) -> None:
    torch.manual_seed(0)
    assert_agrees(adapt(layer, r=2, conv_split=split, compute=compute), torch.randn(shape))


@pytest.mark.parametrize("split", ["balanced_2d", "in", "out"])
@pytest.mark.parametrize("adapt_bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape", "pays"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), (6, 3, 24, 24), True),
        (nn.Conv2d(3, 4, (3, 5), stride=2, dilation=(1, 2), bias=False), (6, 3, 24, 32), True),
        (nn.Conv1d(3, 4, 5, padding=2), (6, 3, 300), True),
        (nn.Conv2d(8, 8, 3, padding=1), (6, 8, 4, 4), False),
    ],
    ids=["padded", "strided, dilated, no bias", "1d", "small"],
)
def test_on_large_images_each_example_gets_a_kernel_of_its_own_in_evaluation(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, shape: tuple[int, ...], pays: bool, adapt_bias: bool, split: str
) -> None:
    torch.manual_seed(0)
    model = adapt(layer, r=2, conv_split=split, adapt_bias=adapt_bias, alpha=0.5).eval()
    x, clients, by_example = torch.randn(shape), torch.tensor([4, 0, 2, 2, 1, 3]), Mock(wraps=conv_by_example)
    monkeypatch.setattr(conv, "conv_by_example", by_example)
    expected = model(x, client_ids=clients)
    assert not by_example.called  # autograd would have to go through the kernels
    with torch.no_grad():
        assert relative_error(model(x, client_ids=clients), expected.double()) < TOLERANCE
    assert by_example.called == pays  # small images: the kernels would cost more than they save


@pytest.mark.parametrize("split", ["balanced_2d", "balanced", "in", "out", "linear"])
@pytest.mark.parametrize("compute", ["stacked", "merged"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(6, 4, 5, stride=3, padding=1, output_padding=2, groups=2), (6, 6, 7)),
        (nn.ConvTranspose2d(4, 6, (3, 4), stride=(2, 1), padding=1, output_padding=(1, 0)), (6, 4, 5, 6)),
        (nn.ConvTranspose2d(4, 8, 3, dilation=2, groups=4, bias=False), (6, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 4, (3, 2, 3), stride=2, output_padding=1), (6, 2, 3, 4, 3)),
    ],
    ids=["1d grouped", "2d output_padding", "2d depthwise dilated", "3d"],
)
def test_transposed_convolutions_equal_the_reference(
    layer: nn.Module, shape: tuple[int, ...], split: str, compute: str
) -> None:
    torch.manual_seed(0)
    assert_agrees(adapt(layer, r=2, conv_split=split, compute=compute, shared_r=1), torch.randn(shape))


def test_a_transposed_convolution_takes_an_output_size() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    model = adapt(layer, r=2)
    x = torch.randn(2, 4, 5, 5)
    adapted = model.base_model.model[0]
    expected = mixed_layer(adapted, "default", model.mixture(0), 1.0)(x.double(), output_size=[10, 9])
    assert relative_error(adapted(x, output_size=[10, 9]), expected) < TOLERANCE


@pytest.mark.parametrize("compute", ["stacked", "merged", "auto"])
def test_transformers_conv1d_equals_the_reference(compute: str) -> None:
    torch.manual_seed(0)
    assert_agrees(adapt(Conv1D(9, 12), r=2, compute=compute, shared_r=1), torch.randn(6, 7, 12))


@pytest.mark.parametrize("compute", ["stacked", "merged", "auto"])
@pytest.mark.parametrize("shape", [(6,), (6, 7)])
def test_embedding_equals_the_reference(compute: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = adapt(nn.Embedding(20, 9, padding_idx=3), r=2, compute=compute, shared_r=1)
    assert_agrees(model, torch.randint(0, 20, shape))


def test_a_padding_token_stays_padding() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Embedding(20, 9, padding_idx=3)), FloralConfig(target_modules=["0"], r=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        model(torch.tensor([[3, 4]])).square().sum().backward()
        optimizer.step()
    out = model(torch.tensor([[3, 4]]))
    assert not out[0, 0].any() and not torch.equal(out[0, 1], model.base_model.model[0].base_layer.weight[4])


NORMS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "LayerNorm": (nn.LayerNorm(6), (6, 5, 6)),
    "LayerNorm, 2 axes": (nn.LayerNorm((5, 6)), (6, 5, 6)),
    "LayerNorm without bias": (nn.LayerNorm(6, bias=False), (6, 6)),
    "GroupNorm": (nn.GroupNorm(2, 6), (6, 6, 4, 3)),
    "BatchNorm1d": (nn.BatchNorm1d(6), (6, 6)),
    "BatchNorm2d": (nn.BatchNorm2d(6), (6, 6, 4, 3)),
    "InstanceNorm2d": (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (6, 6, 4, 3)),
    "RMSNorm": (nn.RMSNorm(6), (6, 5, 6)),
    "LlamaRMSNorm": (LlamaRMSNorm(6), (6, 5, 6)),
    "GemmaRMSNorm": (GemmaRMSNorm(6), (6, 5, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_equal_the_reference(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(NORMS[name])
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    model = get_peft_model(
        nn.Sequential(layer, nn.Identity()),
        FloralConfig(
            target_modules=["nothing"], num_adaptors=3, num_clients=5, adapt_norms=True, shared_r=1, alpha=2.0
        ),
    )
    randomize(model)
    model.eval()
    x = torch.randn(shape)
    expected = [mixed_layer(model.base_model.model[0], "default", model.mixture(k), 2.0)(x.double()) for k in range(5)]
    for client in range(5):
        with model.client(client):
            assert relative_error(model(x), expected[client]) < TOLERANCE
    mixed = torch.stack([expected[client][row] for row, client in enumerate([4, 0, 2, 2, 1, 3])])
    assert relative_error(model(x, client_ids=[4, 0, 2, 2, 1, 3]), mixed) < TOLERANCE
    model.set_client(3)
    assert relative_error(model.merge_and_unload()(x), expected[3]) < TOLERANCE


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("mixed", [True, False])
def test_norms_train_as_the_plain_layer_would(name: str, mixed: bool) -> None:
    """Fresh adaptors change nothing, and running statistics are updated once, as ever."""
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(NORMS[name])
    plain = copy.deepcopy(layer)
    config = FloralConfig(target_modules=["0"], num_clients=2)
    model = get_peft_model(nn.Sequential(layer), config).train()
    x = torch.randn(shape)
    out = model(x, client_ids=[0, 1] * 3) if mixed else model(x)
    assert torch.equal(out, plain(x))
    for own, reference in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(own, reference)


def test_adapt_norms_finds_all_norms_but_the_excluded() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4)))
    config = FloralConfig(target_modules=["0"], adapt_norms=True, exclude_modules=["2.1"])
    assert get_peft_model(net, config).targeted_module_names == ["0", "1", "2.0"]


@pytest.mark.parametrize("layer", [nn.Linear(12, 9), nn.Conv2d(12, 9, 3, padding=1)])
@pytest.mark.parametrize("train_base", [True, False])
def test_gradients_are_the_same_by_every_path_and_for_mixed_batches(layer: nn.Module, train_base: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 12) if isinstance(layer, nn.Linear) else torch.randn(4, 12, 6, 6)
    clients = [3, 0, 4, 3]

    def gradients(compute: str, mixed: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        fresh = type(layer)(12, 9, 3, padding=1) if isinstance(layer, nn.Conv2d) else nn.Linear(12, 9)
        model = adapt(fresh.double(), r=2, compute=compute, train_base=train_base, shared_r=1).double()
        if mixed:
            model(x.double(), client_ids=torch.tensor(clients)).square().sum().backward()
        else:
            for row, client in enumerate(clients):
                with model.client(client):
                    model(x[row : row + 1].double()).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients("stacked", mixed=False)
    assert any("base_layer" in name for name in expected) == train_base
    assert any("logits" in name for name in expected)
    for other in (gradients("merged", mixed=False), gradients("stacked", mixed=True), gradients("auto", mixed=True)):
        assert other.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(other[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Linear(12, 9), nn.Conv2d(12, 9, 3)])
@pytest.mark.parametrize("compute", ["stacked", "merged", "auto"])
def test_fresh_adaptors_change_no_bit_of_the_output(layer: nn.Module, compute: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 12) if isinstance(layer, nn.Linear) else torch.randn(4, 12, 6, 6)
    expected = layer(x)
    config = FloralConfig(target_modules=["0"], compute=compute, shared_r=2, num_clients=2)
    model = get_peft_model(nn.Sequential(layer), config)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x, client_ids=torch.tensor([0, 1, 1, 0])), expected)


def test_init_std_makes_the_pure_models_differ() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), FloralConfig(target_modules=["0"], init_std=0.3))
    b = model.base_model.model[0].floral_B["default"]
    assert 0.2 < float(b.detach().std()) < 0.4


def test_a_mixture_of_a_layer_equals_the_weighted_sum_of_pure_ones() -> None:
    """The mixture is linear in π: a one-hot π gives a pure model, with nothing leaking from the others."""
    torch.manual_seed(0)
    model = adapt(nn.Linear(12, 9), r=2)
    x = torch.randn(3, 12)
    pure = []
    for c in range(3):
        logits = torch.full((1, 3), -1e4)
        logits[0, c] = 0
        model.load_router_state_dict({"logits": logits}, client=c)
        assert model.mixture(c).tolist() == [float(i == c) for i in range(3)]
        with model.client(c):
            pure.append(model(x))
    pi = model.mixture(4)
    with model.client(4):
        torch.testing.assert_close(model(x), sum(p * y for p, y in zip(pi, pure, strict=True)), rtol=1e-5, atol=1e-6)


def test_several_active_adapters_add_up() -> None:
    torch.manual_seed(0)
    model = adapt(nn.Linear(12, 9), r=2)
    model.add_adapter("other", FloralConfig(target_modules=["0"], num_adaptors=2, r=3))
    randomize(model, seed=1)
    x = torch.randn(3, 12)
    base = model.base_model.model[0].base_layer(x)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(model(x) - base)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), base + alone[0] + alone[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("operation", "clients", "inputs"),
    [(StackedLinear, 1, 4), (StackedLinear, 1, 60), (StackedLinear, 2, 4), (MergedLinear, 1, 4)],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapt_bias", [True, False])
def test_a_fused_linear_layer_has_the_right_derivatives_the_second_too(
    operation: Any, clients: int, inputs: int, bias: bool, adapt_bias: bool
) -> None:
    torch.manual_seed(0)
    x, weight, shift = torch.randn(2, 2, inputs), torch.randn(5, inputs), torch.randn(5) if bias else None
    a, b, beta = torch.randn(2, 3, inputs), torch.randn(5, 2, 3), torch.randn(2, 5) if adapt_bias else None
    tensors = (x, weight, shift, a, b, beta, torch.rand(2) if clients == 1 else torch.rand(clients, 2))
    given: Any = [t if t is None else t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(operation.apply, given)
    assert torch.autograd.gradgradcheck(operation.apply, given)


@pytest.mark.parametrize("trained", [True, False], ids=["through the kernel's gradient", "through small convolutions"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_convolution_has_the_right_derivatives_the_second_too(trained: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=bias)
    a, b, beta = torch.randn(2, 1, 6, 1, 2), torch.randn(5, 2, 1, 3, 1), torch.randn(2, 5) if bias else None
    assert layer.weight.numel() > 2 * (a.numel() + b.numel())  # else a frozen base takes the kernel's gradient too
    stages = (
        Stage([2, 1], [1, 2], [1, 2]),
        Stage([1, 1], [0, 2], [1, 2]),
        Stage([2, 1], [1, 0], [1, 1]),
    )
    tensors = (torch.randn(1, 6, 4, 3), layer.weight.detach(), layer.bias, a, b, beta, torch.rand(2))
    inputs: Any = [
        t if t is None else t.detach().double().requires_grad_(i != 1 or trained) for i, t in enumerate(tensors)
    ]

    def convolve(*given: Any) -> Tensor:
        return FusedConv.apply(*given, stages)

    assert torch.autograd.gradcheck(convolve, inputs)
    assert torch.autograd.gradgradcheck(convolve, inputs)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("split", ["out", "in", "linear", "balanced", "balanced_2d"])
@pytest.mark.parametrize(
    ("kind", "kernel", "stride"), [(nn.Conv1d, 3, 2), (nn.Conv2d, (3, 5), (1, 2)), (nn.Conv3d, (3, 1, 2), 1)]
)
def test_fused_and_separate_convolutions_have_one_gradient(
    kind: Any, kernel: Any, stride: Any, split: str, trained: bool
) -> None:
    torch.manual_seed(0)
    layer = kind(16, 12, kernel, stride=stride, padding=2, dilation=2)
    x = torch.randn(2, 16, *[9] * len(layer.kernel_size), dtype=torch.float64)
    gradients = []
    for compute in ("stacked", "auto"):
        model = adapt(copy.deepcopy(layer), r=1, conv_split=split, compute=compute, train_base=trained).double()
        given = x.clone().requires_grad_()
        with model.client(2):
            output = model(given)
        assert (type(output.grad_fn).__name__ == "FusedConvBackward") == (compute == "auto")
        output.square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        gradients.append([output.detach(), given.grad, *(found[name] for name in sorted(found))])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_frozen_parts_get_no_gradient() -> None:
    torch.manual_seed(0)
    for frozen in ("floral_A", "floral_B", "floral_bias", "logits"):
        model = adapt(nn.Linear(12, 9), r=2, compute="stacked")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("base_layer" not in name and frozen not in name)
        model(torch.randn(3, 12)).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_positions_are_looked_up_for_each_client() -> None:
    """GPT-2 asks for its positions once, in a batch of one, whatever the number of examples."""
    torch.manual_seed(0)
    model = adapt(nn.Embedding(20, 9), r=2)
    positions = torch.arange(5)[None]
    alone = []
    for client in (4, 0, 2):
        with model.client(client):
            alone.append(model(positions)[0])
    torch.testing.assert_close(model(positions, client_ids=[4, 0, 2]), torch.stack(alone))
