"""A client's router from its examples: the posterior, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from floral_peft import FloralConfig
from floral_peft.tuner import Ensemble, pure_losses

from .models import TOKENS, floral_llama, get_peft_model
from .reference import randomize


X = torch.linspace(-1, 1, 24).view(6, 4)
Y = torch.arange(6) % 3
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def net(**config: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), FloralConfig(target_modules=["0"], r=2, **config))
    randomize(model)
    return model


def loss_of(model: Any, reduction: str = "mean") -> Any:
    return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def sums(model: Any) -> Tensor:
    return sum(4 * a + 2 * b for a, b in [pure_losses(model, loss_of(model), BATCHES)])  # type: ignore[return-value]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("config", [{}, {"router_temperature": 3.0}])
def test_it_is_the_posterior_given_the_examples(reduction: str, config: dict[str, Any]) -> None:
    model = net(**config)
    expected = torch.softmax(-sums(model), dim=0)
    torch.testing.assert_close(model.fit_router(BATCHES, loss=loss_of(model, reduction)), expected)
    torch.testing.assert_close(model.mixture(), expected)
    prior = torch.tensor([0.5, 0.0, 0.25, 0.25])
    found = model.fit_router(BATCHES, loss=loss_of(model), prior=prior, temperature=4.0)
    torch.testing.assert_close(found, torch.softmax(prior.log() - sums(model) / 4, dim=0))
    assert found[1] == 0


def test_a_model_that_does_not_take_the_columns_asks_for_a_loss() -> None:
    with pytest.raises(TypeError, match=r"columns \['inputs', 'labels'\] by keyword .* give loss=\.\.\."):
        net().fit_router([{"inputs": X, "labels": Y}])


def test_a_type_error_inside_the_model_is_its_own() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            found: Tensor = self.linear(inputs.tolist())
            return found

    model = get_peft_model(Broken(), FloralConfig(target_modules=["linear"]))
    with pytest.raises((TypeError, AttributeError)) as caught:
        model.fit_router([{"inputs": X}])
    assert "loss=" not in str(caught.value)


def test_nothing_but_the_router_changes() -> None:
    model = net(num_clients=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_client(1)
    model.fit_router(BATCHES, loss=loss_of(model))
    after = model.state_dict()
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(changed) == 1 and "logits" in changed[0]
    assert torch.equal(after[changed[0]][[0, 2]], before[changed[0]][[0, 2]])


def test_new_clients_are_known_by_name_from_then_on(tmp_path: Any) -> None:
    model = net()  # a single router, nobody's
    hamlet = model.fit_router(BATCHES, "hamlet", loss=loss_of(model))
    lear = model.fit_router(BATCHES[:1], "lear", loss=loss_of(model))
    again = model.fit_router(BATCHES[1:], "hamlet", loss=loss_of(model))
    assert not torch.allclose(hamlet, again)
    assert torch.equal(model.mixture("lear"), lear) and torch.equal(model.mixture("hamlet"), again)
    with model.client("lear"):
        expected = model(X).detach()
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    loaded.base_model.model[0].base_layer.load_state_dict(model.base_model.model[0].base_layer.state_dict())
    with loaded.client("lear"):
        torch.testing.assert_close(loaded(X).detach(), expected)


def test_other_clients_keep_their_rows_and_the_current_one_stays() -> None:
    model = net(num_clients=2)
    model.set_client(1)
    before = model.mixture([0, 1])
    model.fit_router(BATCHES, 2, loss=loss_of(model))
    assert model.active_peft_config.num_clients == 3 and model.active_peft_config.client_names is None
    model.fit_router(BATCHES, "hamlet", loss=loss_of(model))
    assert torch.equal(model.mixture([0, 1]), before)
    assert torch.equal(model.mixture(), before[1])
    assert torch.equal(model.mixture("hamlet"), model.mixture(2))


@pytest.mark.parametrize("config", [{"router_per_layer": True}, {"num_clients": 2, "client_names": ["a", "b"]}])
def test_every_kind_of_router_is_fitted(config: dict[str, Any]) -> None:
    model = net(**config)
    expected = torch.softmax(-sums(model), dim=0)
    torch.testing.assert_close(model.fit_router(BATCHES, "b", loss=loss_of(model)).view(-1, 4)[0], expected)


def test_a_language_model_needs_no_labels_of_its_own() -> None:
    model = floral_llama().eval()
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    found = model.fit_router(DataLoader(rows, batch_size=3), "ophelia")  # type: ignore[arg-type]
    with torch.no_grad():
        each = [
            pure_losses(model, lambda batch: model(input_ids=batch, labels=batch).loss, [part])[0] * len(part)
            for part in TOKENS.split(3)
        ]
    torch.testing.assert_close(found, torch.softmax(-torch.stack(each).sum(0), dim=0), rtol=1e-4, atol=1e-6)


def test_an_unlabelled_classifier_goes_by_how_sure_it_is() -> None:
    torch.manual_seed(0)
    small = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    small.num_labels = 3
    model = get_peft_model(
        BertForSequenceClassification(small), FloralConfig(target_modules=["query", "value", "classifier"], r=2)
    )
    randomize(model)
    ids = torch.arange(12).view(3, 4)

    (each,) = pure_losses(
        model, lambda batch: model(input_ids=batch).logits.softmax(-1), [ids]
    )  # (C, examples, classes)
    doubts = torch.special.entr(each).sum(-1).mean(-1) - torch.special.entr(each.mean(dim=1)).sum(-1) / 3
    found = model.fit_router([{"input_ids": ids}])
    torch.testing.assert_close(found, torch.softmax(-3 * doubts, dim=0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, model.fit_router([{"input_ids": ids, "labels": torch.tensor([0, 1, 2])}]))


def test_an_ensemble_is_fitted_too() -> None:
    members = [nn.Linear(4, 3) for _ in range(3)]
    model = Ensemble(members)
    found = model.fit_router([(X, Y)], "hamlet", loss=loss_of(model))
    losses = torch.stack([6 * nn.functional.cross_entropy(member(X), Y) for member in members])
    torch.testing.assert_close(found, torch.softmax(-losses, dim=0).detach())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": []}, "no batches to fit"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"prior": [1.0, 1.0]}, "prior must be 4 numbers"),
        ({"prior": [1.0, -1.0, 1.0, 1.0]}, "at least 0"),
        ({"loss": lambda batch: torch.tensor(torch.nan)}, "not finite"),
        ({"loss": None, "batches": [X.view(2, 3, 4)]}, "needs logits"),
    ],
)
def test_what_no_router_can_be_fitted_to_is_refused(given: dict[str, Any], message: str) -> None:
    model = net()
    before = model.mixture()
    with pytest.raises(ValueError, match=message):
        model.fit_router(**{"batches": BATCHES, "loss": loss_of(model)} | given)
    assert torch.equal(model.mixture(), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"client": 1.5}, "a name .str. or a number .int., got 1.5"),
        ({"client": True}, "got True"),
        ({"batches": {"x": X}}, "a single batch, with x: give a list"),
        ({"loss": lambda batch: 1.0}, "returns a tensor, got float"),
    ],
)
def test_what_is_of_another_type_is_named(given: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(TypeError, match=message):
        model.fit_router(**{"batches": BATCHES, "loss": loss_of(model)} | given)


def test_of_several_selected_clients_one_must_be_named() -> None:
    model = net(num_clients=3)
    model.set_client([0, 1])
    with pytest.raises(ValueError, match="2 clients are selected"):
        model.fit_router(BATCHES, loss=loss_of(model))
    model.fit_router(BATCHES, 2, loss=loss_of(model))
    model.set_client(0)
    model.merge_adapter()
    with pytest.raises(ValueError, match="fit a router"):
        model.fit_router(BATCHES, loss=loss_of(model))
