"""Methods that train one model for all clients, or one for each, against steps reckoned by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from floral_peft import FloralConfig
from floral_peft.federated import ParameterGroups, get_method
from floral_peft.methods import Twin

from ..federated.clients import floral_net, net, population, trainer
from .lines import adaptors, line, own, run, weights


COHORTS = pytest.mark.parametrize("cohort", ["loop", "vectorized"])


@COHORTS
def test_fedavg_weighs_clients_by_their_examples(tmp_path: Path, cohort: str) -> None:
    trained = run(tmp_path, "fedavg", line(1.0), cohort=cohort)
    # a: 1 − ½(1 − 3) = 2, b: 1 − ½(1 + 1) = 0, and a quarter of the examples is a's.
    assert weights(trained.model) == {"weight": pytest.approx(0.5)}


@COHORTS
def test_local_only_sends_nothing_and_every_client_goes_its_own_way(tmp_path: Path, cohort: str) -> None:
    trained = run(tmp_path, "local_only", line(1.0), rounds=2, cohort=cohort)
    # a: 1, 2, 2.5 towards 3; b: 1, 0, −0.5 towards −1.
    assert own(trained, "a")["weight"].tolist() == [2.5]
    assert own(trained, "b")["weight"].tolist() == [-0.5]
    assert weights(trained.model) == {"weight": 1.0}
    assert trained.records[0]["bytes_up"] == trained.records[0]["bytes_down"] == 0
    trained.evaluate()
    assert trained.client_metrics["a"]["eval_loss"] == pytest.approx(0.5 * 0.5**2)


def test_running_statistics_belong_to_whom_the_layers_belong() -> None:
    statistics = ("1.running_mean", "1.running_var")
    assert set(statistics) <= set(ParameterGroups.of(net(norm=True), get_method("local_only")).private)
    assert ParameterGroups.of(net(norm=True), get_method("fedavg")).statistics == statistics
    twin = ParameterGroups.of(Twin(net(norm=True)), get_method("ditto"))
    assert twin.statistics == tuple(f"common.{name}" for name in statistics)
    assert {f"personal.{name}" for name in statistics} <= set(twin.private)


def test_fine_tuning_is_for_evaluation_only(tmp_path: Path) -> None:
    trained = run(tmp_path, "fedavg_finetune", line(1.0), finetune_epochs=2)
    trained.evaluate()
    # From FedAvg's 0.5, a goes to 0.5 − ½(0.5 − 3) = 1.75 and then to 2.375, b to −0.25 and then to −0.625.
    assert trained.client_metrics["a"]["eval_loss"] == pytest.approx(0.5 * 0.625**2)
    assert trained.client_metrics["b"]["eval_loss"] == pytest.approx(0.5 * 0.375**2)
    assert weights(trained.model) == {"weight": 0.5}


def test_fine_tuning_at_evaluation_does_not_change_the_training(tmp_path: Path) -> None:
    often = trainer(tmp_path / "a", "fedavg_finetune", net(norm=True), rounds=3, eval_steps=1)
    never = trainer(tmp_path / "b", "fedavg", net(norm=True), rounds=3)
    often.train()
    never.train()
    for (name, one), other in zip(often.model.state_dict().items(), never.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@COHORTS
def test_fedprox_stops_where_the_pull_balances_the_gradient(tmp_path: Path, cohort: str) -> None:
    settings: dict[str, Any] = {"local_steps": 2, "cohort": cohort}
    # a: 1, 2, and there (2 − 3) + 1·(2 − 1) = 0; b: 1, 0, and there (0 + 1) + 1·(0 − 1) = 0.
    pulled = run(tmp_path / "a", "fedprox", line(1.0), proximal_weight=1.0, **settings)
    assert weights(pulled.model) == {"weight": pytest.approx(0.5)}
    # Without a pull they go on to 2.5 and −0.5, as with FedAvg.
    free = run(tmp_path / "b", "fedprox", line(1.0), proximal_weight=0.0, **settings)
    assert weights(free.model) == {"weight": pytest.approx(0.25)}
    assert weights(run(tmp_path / "c", "fedavg", line(1.0), **settings).model) == weights(free.model)


@COHORTS
def test_dittos_common_model_is_fedavgs_and_its_personal_ones_are_held_near_it(tmp_path: Path, cohort: str) -> None:
    settings: dict[str, Any] = {"local_steps": 2, "cohort": cohort, "proximal_weight": 1.0}
    first = run(tmp_path / "1", "ditto", Twin(line(1.0)), **settings)
    assert weights(first.model)["common.weight"] == pytest.approx(0.25)  # FedAvg's after two steps
    assert own(first, "a")["personal.weight"].tolist() == [pytest.approx(2.0)]  # FedProx's
    assert own(first, "b")["personal.weight"].tolist() == [pytest.approx(0.0)]
    second = run(tmp_path / "2", "ditto", Twin(line(1.0)), rounds=2, **settings)
    # Now the anchor is 0.25. a: 2 − ½((2 − 3) + (2 − 0.25)) = 1.625, which is where the two forces balance.
    assert own(second, "a")["personal.weight"].tolist() == [pytest.approx(1.625)]
    second.evaluate()
    assert second.client_metrics["a"]["eval_loss"] == pytest.approx(0.5 * 1.375**2)


def test_dittos_loss_is_the_personal_models(tmp_path: Path) -> None:
    trained = run(tmp_path, "ditto", Twin(line(1.0)))
    assert trained.records[0]["train_loss"] == pytest.approx(2.0)  # ½·(1 − 3)² and ½·(1 + 1)²


@COHORTS
def test_a_local_adaptor_stays_with_its_client(tmp_path: Path, cohort: str) -> None:
    base = nn.Sequential(line(1.0, 0.0))
    model = get_method("local_adaptor").prepare(base, adaptors(num_adaptors=4))
    trained = run(tmp_path, "local_adaptor", model, cohort=cohort)
    found = weights(trained.model).items()
    held = {name.rsplit(".")[-1]: value for name, value in found if "base_layer" in name}
    # The adaptor starts as nothing: the base moves as with FedAvg, and a bias by −½ times the error, −2 or 2.
    assert held == {"weight": pytest.approx(0.5), "bias": pytest.approx(0.25 * 1 - 0.75 * 1)}
    for client_id, bias in (("a", 1.0), ("b", -1.0)):
        assert {n: v.tolist() for n, v in own(trained, client_id).items() if "bias" in n} == {
            "base_model.model.0.floral_bias.default": [bias]
        }
    assert trained.records[0]["usage"] is None


def test_alternating_trains_the_local_adaptor_before_the_base(tmp_path: Path) -> None:
    model = get_method("local_adaptor").prepare(nn.Sequential(line(1.0, 0.0)), adaptors(init_std=0.0))
    trained = run(tmp_path, "local_adaptor", model, alternating=True)
    biases = own(trained, "b")["base_model.model.0.floral_bias.default"]
    assert biases.tolist() == [-1.0]  # with the base still at 1
    base = next(value for name, value in weights(trained.model).items() if name.endswith("base_layer.weight"))
    assert base != pytest.approx(0.5)  # with the adaptors already moved


def test_a_client_of_ditto_predicts_with_one_model_of_the_two() -> None:
    twin, plain = Twin(net()), net()
    assert get_method("ditto").deployed(twin) is twin.personal
    assert get_method("fedavg").deployed(plain) is plain


def test_methods_of_one_model_refuse_a_router() -> None:
    for name in ("fedavg", "fedavg_finetune", "fedprox", "local_only", "ditto"):
        with pytest.raises(ValueError, match=f'method "{name}" trains one model for all clients, or for each'):
            ParameterGroups.of(floral_net(), get_method(name))
    with pytest.raises(ValueError, match='method "local_adaptor" needs a model with FLORAL adaptors'):
        ParameterGroups.of(net(), get_method("local_adaptor"))


def test_ditto_needs_two_models(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r'method "ditto" got a Sequential; .*from floral_peft\.methods import Twin'):
        trainer(tmp_path, "ditto", net(), population())
    assert isinstance(get_method("ditto").prepare(net(), FloralConfig()), Twin)
