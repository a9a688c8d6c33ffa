"""Methods with C full models, against steps reckoned by hand: lines of slopes 1 and −1 for clients at 3 and at −1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floral_peft import FloralConfig
from floral_peft.federated import ParameterGroups, get_method
from floral_peft.federated.batches import Batch
from floral_peft.methods.fedem import MixtureForward
from floral_peft.tuner import Ensemble

from ..federated.clients import floral_net, net, population, trainer
from .lines import line, run, weights


COHORTS = pytest.mark.parametrize("cohort", ["loop", "vectorized"])


def two_lines() -> Ensemble:
    return Ensemble([line(1.0), line(-1.0)])


def slopes(trained: Any) -> list[float]:
    held = weights(trained.model)
    return [held["members.0.weight"], held["members.1.weight"]]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# Ensemble


@COHORTS
def test_an_ensemble_mixes_outputs_and_averages_each_model_over_its_users(tmp_path: Path, cohort: str) -> None:
    trained = run(tmp_path, "ensemble", two_lines(), cohort=cohort)
    # π = (½, ½): the output is 0, the error −3 for a and 1 for b. Slopes move by −½·½·error, logits by −½·(±1)·error.
    user_a, user_b = sigmoid(1.5 + 1.5), sigmoid(-0.5 - 0.5)
    _, mixtures = trained.mixtures()
    assert mixtures[:, 0].tolist() == [pytest.approx(user_a), pytest.approx(user_b)]
    first = (1.75 * user_a + 3 * 0.75 * user_b) / (user_a + 3 * user_b)
    second = (-0.25 * (1 - user_a) + 3 * -1.25 * (1 - user_b)) / ((1 - user_a) + 3 * (1 - user_b))
    assert slopes(trained) == [pytest.approx(first), pytest.approx(second)]


@COHORTS
@pytest.mark.parametrize("method", ["ensemble", "ifca"])
def test_under_true_routing_each_cluster_has_a_model_of_its_own(tmp_path: Path, method: str, cohort: str) -> None:
    trained = run(tmp_path, method, two_lines(), optimal_routing=True, cohort=cohort)
    # a alone moves the first: 1 − ½(1 − 3) = 2. b is at −1 already.
    assert slopes(trained) == [pytest.approx(2.0), pytest.approx(-1.0)]
    trained.evaluate()
    assert trained.client_metrics["a"]["eval_loss"] == pytest.approx(0.5)
    assert trained.client_metrics["b"]["eval_loss"] == pytest.approx(0.0)


def test_a_model_that_a_client_does_not_use_is_not_run(tmp_path: Path) -> None:
    model = two_lines()
    calls: list[int] = []
    for number, member in enumerate(model.members):
        member.register_forward_hook(lambda *_, number=number: calls.append(number))
    trained = run(tmp_path, "ensemble", model, optimal_routing=True)
    calls.clear()
    trained.evaluate()
    assert calls == [0, 1]  # a's and b's only


def test_an_ensembles_models_start_apart_and_the_first_is_the_base() -> None:
    base = net()
    torch.manual_seed(5)
    prepared: Any = get_method("ensemble").prepare(base, FloralConfig(num_adaptors=3))
    starts = [member[0].weight for member in prepared.members]
    assert len(starts) == 3
    assert starts[0] is base[0].weight
    assert not any(torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_model_that_cannot_start_anew_is_refused_by_name() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"1 \(Scale\) has parameters but no reset_parameters\(\)"):
        get_method("ensemble").prepare(nn.Sequential(nn.Linear(1, 1), Scale()), FloralConfig())


def test_running_statistics_follow_their_model() -> None:
    model = Ensemble([net(norm=True), net(norm=True)])
    groups = ParameterGroups.of(model, get_method("ensemble"))
    assert set(groups.statistics) == {f"members.{c}.1.running_{what}" for c in (0, 1) for what in ("mean", "var")}
    assert {groups.clustered[name].adaptor for name in groups.statistics if name.startswith("members.1.")} == {1}
    assert not set(groups.statistics) & set(groups.optimized)
    assert ParameterGroups.of(model, get_method("fedem")).clustered == {}


def test_an_ensemble_chooses_clients_as_a_floral_model_does() -> None:
    model = Ensemble([line(1.0), line(-1.0)])
    model.set_routers(torch.tensor([[[0.0, -1e4]], [[-1e4, 0.0]]]), ["a", "b"])
    inputs = torch.ones(2, 1)
    with model.client("b"):
        assert model(inputs).flatten().tolist() == [-1.0, -1.0]
    assert model(inputs, client_ids=torch.tensor([0, 1])).flatten().tolist() == [1.0, -1.0]
    assert model.mixture("a").tolist() == [1.0, 0.0]


def test_methods_of_several_models_refuse_others() -> None:
    for name in ("ensemble", "ifca", "fedem"):
        for model in (net(), floral_net()):
            with pytest.raises(
                ValueError,
                match=rf'method "{name}" needs an Ensemble of models .*from floral_peft\.tuner import Ensemble',
            ):
                ParameterGroups.of(model, get_method(name))


# IFCA


@COHORTS
def test_ifca_takes_the_model_of_the_smallest_loss(tmp_path: Path, cohort: str) -> None:
    trained = run(tmp_path, "ifca", two_lines(), cohort=cohort)
    # a: losses 2 and 8, b: 2 and 0. Each trains its own choice, as under true routing.
    assert slopes(trained) == [pytest.approx(2.0), pytest.approx(-1.0)]
    assert trained.mixtures()[1].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_ifca_chooses_anew_at_every_visit(tmp_path: Path) -> None:
    models = [line(0.0), line(-4.0)]
    trained = run(tmp_path, "ifca", Ensemble(models), rounds=2)
    # Both first take 0, which goes to 1.5 for a and −0.5 for b, on average to 0. So again, and nobody takes −4.
    assert slopes(trained) == [pytest.approx(0.0, abs=1e-6), -4.0]
    with torch.no_grad():
        models[1].weight.fill_(3.0)
    assert trained.mixtures()[1].tolist() == [[0.0, 1.0], [1.0, 0.0]]


# FedEM


@COHORTS
def test_fedem_weighs_models_by_the_posterior_of_each_example(tmp_path: Path, cohort: str) -> None:
    trained = run(tmp_path, "fedem", two_lines(), cohort=cohort)
    # Losses (2, 8) for a and (2, 0) for b. E step from π = (½, ½), then a step with the posterior under the new π.
    share_a, share_b = sigmoid(8 - 2), sigmoid(0 - 2)
    again_a = sigmoid(math.log(share_a / (1 - share_a)) + 6)
    again_b = sigmoid(math.log(share_b / (1 - share_b)) - 2)
    a = (1 + 0.5 * again_a * 2, -1 + 0.5 * (1 - again_a) * 4)
    b = (1 - 0.5 * again_b * 2, -1 - 0.5 * (1 - again_b) * 0)
    expected = [0.25 * one + 0.75 * other for one, other in zip(a, b, strict=True)]  # p(k), not p(k|c)
    assert slopes(trained) == [pytest.approx(value, rel=1e-5) for value in expected]
    assert trained._clients.private("a")["floral_router.logits.default"].softmax(-1)[0, 0, 0] == pytest.approx(share_a)
    assert trained.records[0]["usage"] is None  # π is not sent


def test_fedem_under_true_routing_is_the_true_model_alone(tmp_path: Path) -> None:
    trained = run(tmp_path, "fedem", two_lines(), optimal_routing=True)
    assert slopes(trained) == [pytest.approx(0.25 * 2.0 + 0.75 * 1.0), pytest.approx(-1.0)]


def test_fedems_loss_is_the_mixtures_likelihood_and_its_gradient_weighs_by_the_posterior() -> None:
    torch.manual_seed(0)
    model = Ensemble([nn.Linear(3, 4), nn.Linear(3, 4)])
    model.set_routers(torch.tensor([[[0.4, -0.3]]]))
    forward = MixtureForward(model)
    batch: Batch = {"x": torch.randn(5, 3), "labels": torch.tensor([0, 1, 2, 3, 0])}
    prediction = forward(batch)

    mixture = torch.tensor([0.4, -0.3]).softmax(dim=0)
    probabilities = [member(batch["x"]).softmax(dim=-1) for member in model.members]
    mixed = mixture[0] * probabilities[0] + mixture[1] * probabilities[1]
    of_labels: Tensor = mixed[torch.arange(5), batch["labels"]]
    assert torch.allclose(prediction.logits.exp(), mixed, atol=1e-6)
    assert torch.allclose(prediction.loss, -of_labels.log().mean(), atol=1e-6)

    each = forward.losses(batch)
    posterior = (mixture.log()[:, None] - each).softmax(dim=0).detach()
    members = list(model.members.parameters())
    found = torch.autograd.grad(prediction.loss, members)
    for one, other in zip(found, torch.autograd.grad((posterior * each).sum() / 5, members), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


# All of them


@pytest.mark.parametrize("method", ["ensemble", "ifca", "fedem"])
def test_clusters_that_disagree_are_found(tmp_path: Path, method: str) -> None:
    data = population(num_clients=4, num_examples=60)
    model = Ensemble([net(seed=0), net(seed=1)])  # IFCA needs a start at which clusters choose apart
    settings: dict[str, Any] = {"rounds": 12, "learning_rate": 0.3, "router_learning_rate": 3.0, "local_epochs": 2}
    trained = trainer(tmp_path, method, model, data, **settings)
    trained.train()
    chosen = trained.mixtures()[1].argmax(dim=1).tolist()
    assert chosen[0] == chosen[2] != chosen[1] == chosen[3]
    assert trained.evaluate()["eval_accuracy"] > 0.8
    with trained.model.client("client 1"):  # afterwards the model holds the clients' routers
        assert int(trained.model.mixture().argmax()) == chosen[1]
