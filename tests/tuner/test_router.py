"""Clients, mixtures and the router's variants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from floral_peft import FloralConfig
from floral_peft.tuner import Router

from .models import TOKENS, floral_llama, get_peft_model
from .reference import randomize


def adapted(**config: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    settings: dict[str, Any] = {"target_modules": ["0", "1"], "num_adaptors": 3, "num_clients": 4, "r": 2} | config
    model = get_peft_model(net, FloralConfig(**settings))
    randomize(model)
    return model


X = torch.linspace(-1, 1, 16).view(4, 4)


def test_a_mixture_is_the_softmax_of_the_logits() -> None:
    model = adapted(router_temperature=0.5)
    logits = model.router_state_dict(2)["logits"]
    assert logits.shape == (1, 3)
    torch.testing.assert_close(model.mixture(2), torch.softmax(logits[0] / 0.5, -1))
    assert model.mixture([0, 3]).shape == (2, 3)
    assert not model.mixture(0).requires_grad


def test_the_first_mixture_is_uniform() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), FloralConfig(target_modules=["0"], num_adaptors=5))
    assert model.mixture().tolist() == pytest.approx([0.2] * 5)


def test_client_returns_to_whom_it_found_even_after_an_error() -> None:
    model = adapted()
    model.set_client(1)
    with pytest.raises(KeyError), model.client(3):
        raise KeyError
    torch.testing.assert_close(model.mixture(), model.mixture(1))


def test_who_trains_or_merges_without_having_chosen_a_client_is_told_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    with torch.no_grad():
        model(X)
    model.eval()(X)
    model.train()(X, client_ids=[0, 1, 2, 3])
    with model.client(2):
        model(X)
    assert not caplog.records
    model(X)
    model(X)
    model.merge_adapter()
    (told,) = caplog.messages
    assert told.startswith("no client has been chosen: a training pass uses the first router of the table.")
    caplog.clear()
    adapted().merge_adapter()
    assert "merging takes the first router" in caplog.text


def test_a_pass_that_uses_one_router_or_none_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    with model.disable_adapter():
        model(X)
    model.add_adapter("solo", FloralConfig(target_modules=["0"], num_adaptors=2))
    model.set_adapter("solo")
    model(X)
    assert not caplog.records
    model.set_adapter("default")
    model(X)
    assert "a training pass uses the first router" in caplog.text
    caplog.clear()
    model.set_routers(torch.zeros(2, 1, 3))  # other clients, of whom nobody has been chosen
    model(X)
    assert "a training pass uses the first router" in caplog.text


def test_nobody_is_told_who_has_chosen_a_client_or_has_but_one(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    model.set_client(0)
    model.fit_router([{"input": X}], client=9, loss=lambda batch: model(batch["input"]).square().mean())
    model(X)
    model.merge_adapter()
    adapted(num_clients=None)(X)
    assert not caplog.records


def test_client_ids_hold_for_one_call() -> None:
    model = adapted()
    alone = model(X)
    mixed = model(X, client_ids=[3, 1, 2, 0])
    assert not torch.equal(mixed, alone)
    assert torch.equal(model(X), alone)
    torch.testing.assert_close(model(X, client_ids=torch.tensor([0, 0, 0, 0])), alone)


def test_an_error_in_a_call_with_client_ids_leaves_the_client_alone() -> None:
    model = adapted()
    alone = model(X)
    with pytest.raises(RuntimeError):
        model(X[:, :3], client_ids=[3, 1, 2, 0])
    assert torch.equal(model(X), alone)


@pytest.mark.parametrize(
    ("client", "error", "message"),
    [
        (4, ValueError, r"Client 4 is out of range.*4 rows.*num_clients=4"),
        (-1, ValueError, "Client -1 is out of range"),
        ("hamlet", ValueError, "'hamlet' is unknown.*client_names"),
        (1.0, TypeError, "name"),
        (True, TypeError, "name"),
        ([0, None], TypeError, "name"),
        ([], ValueError, "No client"),
        (torch.tensor([0.5]), TypeError, "integer tensor"),
        (torch.tensor([[0], [1]]), TypeError, "1-D"),
        (torch.tensor([0, 9]), ValueError, "Client 9 is out of range"),
    ],
)
def test_a_wrong_client_is_named(client: Any, error: type[Exception], message: str) -> None:
    model = adapted()
    with pytest.raises(error, match=message):
        model.set_client(client)
    with pytest.raises((error, TypeError)):
        model(X, client_ids=client)


def test_a_client_whose_name_is_a_number_is_told_as_one() -> None:
    with pytest.raises(ValueError, match=r"'7' is unknown .* did you mean 7\?"):
        adapted(client_names=["hamlet", "ophelia", 7, "../x"]).set_client("7")


def test_a_batch_with_another_number_of_clients_is_refused() -> None:
    with pytest.raises(ValueError, match="Layer 0: 3 clients were given for a batch of 4"):
        adapted()(X, client_ids=[0, 1, 2])


def test_a_single_router_has_no_other_client() -> None:
    model = adapted(num_clients=None)
    model.set_client(0)
    with pytest.raises(ValueError, match=r"Client 1 is out of range.*1 row .*num_clients=None"):
        model.set_client(1)


def test_named_clients() -> None:
    model = adapted(client_names=["hamlet", "ophelia", 7, "../x"])
    torch.testing.assert_close(model.mixture("ophelia"), model.mixture(torch.tensor([1]))[0])
    torch.testing.assert_close(model.mixture(7), model.mixture(torch.tensor([2]))[0])
    torch.testing.assert_close(model(X, client_ids=["../x"] * 4), model(X, client_ids=torch.tensor([3] * 4)))
    with pytest.raises(ValueError, match=r"Client 1 is unknown.*'hamlet'"):
        model.set_client(1)
    with pytest.raises(ValueError, match=r"knows 'hamlet', 'ophelia', 7, '../x': did you mean 'hamlet'\?"):
        model.set_client("Hamlet")


def test_routers_can_be_read_written_and_replaced() -> None:
    model = adapted()
    state = {"logits": torch.tensor([[1.0, 2.0, 3.0]])}
    model.load_router_state_dict(state, client=2)
    assert torch.equal(model.router_state_dict(2)["logits"], state["logits"])
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        model.load_router_state_dict({"logits": torch.zeros(1, 2)}, client=0)
    model.set_routers(torch.arange(6.0).view(2, 1, 3), ["a", "b"])
    assert model.mixture("b").tolist() == pytest.approx(torch.softmax(torch.arange(3.0, 6.0), 0).tolist())
    assert model.peft_config["default"].num_clients == 2
    model.set_routers(torch.zeros(1, 1, 3))
    assert model.peft_config["default"].num_clients is None
    with pytest.raises(ValueError, match="shape"):
        model.set_routers(torch.zeros(2, 3))


def test_noise_is_drawn_once_per_pass_in_training_only() -> None:
    model = adapted(router_noise=1.0)
    model.eval()
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))
    seen: list[torch.Tensor] = []
    for layer in (model.base_model.model[0], model.base_model.model[1]):
        layer.register_forward_pre_hook(lambda module, _: seen.append(module.router.mixture("default", 0)))
    model(X)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0][0], model.mixture(0))


def test_top_k_keeps_k_and_they_sum_to_one() -> None:
    model = adapted(router_top_k=2)
    for client in range(4):
        pi = model.mixture(client)
        assert int((pi > 0).sum()) == 2
        assert int(pi.argmin()) == int(model.router_state_dict(client)["logits"][0].argmin())
        torch.testing.assert_close(pi.sum(), torch.tensor(1.0))
    model(X).sum().backward()
    assert torch.isfinite(model.base_model.router.logits["default"].grad).all()


def test_a_single_adaptor_has_a_frozen_router() -> None:
    model = adapted(num_adaptors=1)
    assert not model.base_model.router.logits["default"].requires_grad
    assert model.mixture(0).tolist() == [1.0]


def test_a_router_per_layer() -> None:
    model = adapted(router_per_layer=True)
    assert model.mixture(1).shape == (2, 3)
    assert [layer.slot["default"] for layer in (model.base_model.model[0], model.base_model.model[1])] == [0, 1]
    before = model(X, client_ids=[1] * 4)
    logits = model.router_state_dict(1)["logits"]
    logits[1] += torch.tensor([5.0, 0.0, 0.0])
    model.load_router_state_dict({"logits": logits}, client=1)
    assert not torch.allclose(model(X, client_ids=[1] * 4), before)


def test_a_client_must_be_in_the_tables_of_all_active_adapters() -> None:
    model = adapted()
    model.add_adapter("few", FloralConfig(target_modules=["0"], num_clients=2))
    model.add_adapter("one", FloralConfig(target_modules=["0"]))
    model.set_client(3)
    model.base_model.set_adapter(["default", "few", "one"])
    assert model.base_model.router.client.tolist() == [0]
    with pytest.raises(ValueError, match=r"Client 3 is out of range.*'few' has 2 rows"):
        model.set_client(3)
    model.set_client(1)
    model(X)
    model.base_model.set_adapter(["default", "one"])
    model(X, client_ids=[3, 0, 1, 2])


def test_a_name_must_mean_one_row_in_all_active_adapters() -> None:
    model = adapted(client_names=["a", "b", "c", "d"])
    model.add_adapter("turned", FloralConfig(target_modules=["0"], num_clients=2, client_names=["b", "a"]))
    model.base_model.set_adapter(["default", "turned"])
    with pytest.raises(ValueError, match=r"'a' is row 1 of adapter 'turned' but row 0 of adapter 'default'"):
        model.set_client("a")


def test_one_client_has_a_mixture_of_one_dimension_however_it_is_given() -> None:
    model = adapted()
    for client in (2, np.int64(2), torch.tensor(2)):
        assert torch.equal(model.mixture(client), model.mixture(2)) and model.mixture(client).shape == (3,)


@pytest.mark.parametrize(
    "state",
    [None, torch.zeros(1, 3), {"logits": [1, 2]}, {"x": 1}, {"logits": torch.full((1, 3), torch.nan)}],
    ids=str,
)
def test_a_malformed_router_is_refused(state: Any) -> None:
    model = adapted()
    before = model.mixture(1)
    with pytest.raises(ValueError, match=r"finite tensor of shape \(1, 3\)"):
        model.load_router_state_dict(state, client=1)
    assert torch.equal(model.mixture(1), before)


@pytest.mark.parametrize("graded", [False, True])
def test_all_layers_of_a_pass_share_one_softmax(monkeypatch: pytest.MonkeyPatch, graded: bool) -> None:
    calls: list[str] = []
    softmax = Router._softmax

    def counted(router: Router, adapter_name: str, selection: Any) -> torch.Tensor:
        calls.append(adapter_name)
        return softmax(router, adapter_name, selection)

    model = floral_llama().eval()
    model.set_client([0, 3, 1, 1])
    monkeypatch.setattr(Router, "_softmax", counted)
    with torch.set_grad_enabled(graded):
        model(input_ids=TOKENS)
    assert calls == ["default"]
