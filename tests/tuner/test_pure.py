"""Pure losses are those of one-hot routers, whichever way they are computed, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floral_peft import FloralConfig
from floral_peft.tuner import Ensemble, PureModels, pure_losses

from .models import floral_llama, get_peft_model
from .reference import randomize


X = torch.linspace(-1, 1, 6 * 3 * 4 * 4, dtype=torch.float64).view(6, 3, 4, 4)
Y = torch.arange(6) % 5


def perceptron(**config: Any) -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5)
    )
    return adapted(layers, ["1", "2", "5"], **config)


def convolutional(**config: Any) -> Any:
    torch.manual_seed(0)
    return adapted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)), ["0", "3"], **config)


def adapted(layers: nn.Module, targets: list[str], **config: Any) -> Any:
    model = get_peft_model(layers, FloralConfig(target_modules=targets, num_clients=7, alpha=1.5, r=2, **config))
    randomize(model)
    return model.double()


def loss_of(model: Any) -> Any:
    return lambda rows: nn.functional.cross_entropy(model(X[rows]), Y[rows])


def one_hot(model: Any, client: int, c: int) -> None:
    shape = model.router_state_dict(client)["logits"].shape
    model.load_router_state_dict({"logits": torch.full(shape, -1e4).index_fill(1, torch.tensor([c]), 0.0)}, client)


def by_hand(model: Any, batches: list[Tensor]) -> list[Tensor]:
    rows = []
    model.eval()
    for c in range(model.num_adaptors):
        one_hot(model, 3, c)
        with model.client(3), torch.no_grad():
            rows.append([loss_of(model)(batch) for batch in batches])
    return [torch.stack(losses) for losses in zip(*rows, strict=True)]


BATCHES = [torch.arange(4), torch.arange(4, 6)]


@pytest.mark.parametrize("make", [perceptron, convolutional])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"router_per_layer": True, "router_temperature": 2.0, "router_noise": 1.0},
        {"router_top_k": 2, "shared_r": 1},
        {"adapt_norms": "reparametrized", "compute": "merged"},
    ],
)
def test_they_are_the_losses_of_one_hot_routers(make: Any, config: dict[str, Any]) -> None:
    model = make(**config)
    pure = PureModels(model)
    found = pure.losses(loss_of(model), BATCHES)
    assert pure._together == (make is perceptron)
    pure._together = False
    alone = pure.losses(loss_of(model), BATCHES)
    expected = by_hand(model, BATCHES)
    assert [losses.shape for losses in found] == [(4,), (4,)]
    for got in (found, alone):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_model_is_as_it_was() -> None:
    model = perceptron().train()
    model.base_model.model[5].eval()
    model.set_client([1, 2, 3, 4, 5, 6])
    before, modes = model.state_dict(), [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in before.items()}
    losses = pure_losses(model, loss_of(model), BATCHES)
    assert not any(value.requires_grad for value in losses)
    assert modes == [module.training for module in model.modules()]
    assert model.router.client.tolist() == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {layer.compute["default"] for layer in model.modules() if hasattr(layer, "compute")} == {"auto"}


def test_a_loss_may_be_one_number_per_example_and_a_batch_may_name_its_clients() -> None:
    model = perceptron()

    def losses(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(X[rows], client_ids=rows), Y[rows], reduction="none")

    one, two = pure_losses(model, losses, BATCHES)
    assert one.shape == (4, 4) and two.shape == (4, 2)
    for got, expected in zip((one, two), by_hand(model, BATCHES), strict=True):
        torch.testing.assert_close(got.mean(dim=1), expected)


def test_what_cannot_be_batched_is_computed_one_after_the_other() -> None:
    model = perceptron()
    pure = PureModels(model)
    calls = []

    def loss(rows: Tensor) -> Tensor:
        value = loss_of(model)(rows)
        calls.append(float(value))  # no number within vmap
        return value

    found = pure.losses(loss, BATCHES)
    torch.testing.assert_close(found, by_hand(model, BATCHES))
    pure.losses(loss, BATCHES)
    assert len(calls) == 2 * 4 * 2  # it is not tried a second time


def test_a_layer_with_a_hook_is_called() -> None:
    model = perceptron()
    seen: list[Tensor] = []
    model.base_model.model[5].base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.allclose(pure_losses(model, loss_of(model), BATCHES)[0], by_hand(model, BATCHES)[0])
    assert not torch._C._functorch.is_batchedtensor(seen[0])


def test_a_language_model_with_fused_attention() -> None:
    model = floral_llama().eval()
    ids = torch.arange(24).view(4, 6)
    (found,) = pure_losses(model, lambda batch: model(input_ids=batch, labels=batch).loss, [ids])
    for c in range(3):
        one_hot(model, 2, c)
        with model.client(2), torch.no_grad():
            torch.testing.assert_close(found[c], model(input_ids=ids, labels=ids).loss)


def test_of_an_ensemble_they_are_its_members_losses() -> None:
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double() for _ in range(3)]
    model = Ensemble(members, FloralConfig(num_clients=2))
    found = pure_losses(model, loss_of(model), BATCHES)
    for batch, losses in zip(BATCHES, found, strict=True):
        for member, got in zip(members, losses, strict=True):
            torch.testing.assert_close(got, nn.functional.cross_entropy(member(X[batch]), Y[batch]).detach())


def test_several_active_adapters_have_no_one_set_of_pure_models() -> None:
    model = perceptron()
    model.add_adapter("other", FloralConfig(target_modules=["1"]))
    pure_losses(model, loss_of(model), BATCHES)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 active FLORAL adapters.*set_adapter"):
        PureModels(model)
