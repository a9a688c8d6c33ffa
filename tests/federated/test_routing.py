"""How clients find their routers: by local steps, or as a posterior over the adaptors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floral_peft.federated import FederatedArguments, UpdateError
from floral_peft.federated.aggregation import ClientUpdate, check_update
from floral_peft.federated.label_prior import label_log_prior
from floral_peft.federated.routing import RouterUpdate, get_router_update, register_router_update, schedule
from floral_peft.federated.routing.balance import balance
from floral_peft.tuner import separate_adaptors

from .clients import floral_net, population, tensors, trainer


POSTERIOR: dict[str, Any] = {"router_update": "posterior"}


def started(**config: Any) -> Any:
    """A model whose adaptors differ from the start."""
    return floral_net(init_std=0.7, **config)


def pure_losses(run: Any, client_id: str, discount: bool = True) -> Tensor:
    """f_c of one client, by the model's public interface."""
    data = run.dataset[client_id]["train"]
    points, labels = torch.tensor(data["points"][:]), torch.tensor(data["labels"][:])
    counts = torch.bincount(labels, minlength=3) + 0.3
    prior = torch.log(counts / counts.sum()) if discount else torch.zeros(3)
    losses = []
    for adaptor in range(run._routers.shape[-1]):
        one_hot = torch.full((1, *run._routers.shape), -1e4)
        one_hot[..., adaptor] = 0.0
        run.model.set_routers(one_hot, [client_id])
        with run.model.client(client_id), torch.no_grad():
            losses.append(nn.functional.cross_entropy(run.model(points) + prior, labels))
    return torch.stack(losses)


# The posterior


@pytest.mark.parametrize("settings", [{}, {"label_prior": False}])
@pytest.mark.parametrize("config", [{}, {"router_per_layer": True}, {"router_temperature": 2.5}])
def test_a_client_is_evaluated_with_the_posterior_given_its_examples(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    run = trainer(tmp_path, model=started(**config), **POSTERIOR, **settings)
    ids, mixtures = run.mixtures()
    for client_id, mixture in zip(ids, mixtures, strict=True):
        losses = pure_losses(run, client_id, discount=settings.get("label_prior", True))
        count = run.dataset.num_examples(client_id, "train")
        assert torch.allclose(mixture, torch.softmax(-count * losses, dim=0), atol=1e-4)


def test_a_client_keeps_its_posterior_without_the_balance_and_remembers_little_of_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(), learning_rate=0.0, rounds=2, **POSTERIOR)
    run.train()
    kept = run._store.get("client 0")[run._routers.name]
    evidence = -run.dataset.num_examples("client 0", "train") * pure_losses(run, "client 0")
    expected = schedule.CLIENT_MEMORY * (evidence - evidence.max()) + evidence
    assert torch.allclose(kept.flatten(), expected - expected.max(), atol=1e-3)


def test_the_server_remembers_fading_sums_over_clients(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(), learning_rate=0.0, rounds=2, save_steps=2, **POSTERIOR)
    run.train()
    memory = json.loads((tmp_path / "checkpoint-2/server/state.json").read_bytes())["routing"]
    usage = torch.zeros(2, dtype=torch.float64)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    theta = {client_id: torch.zeros(2) for client_id in run.dataset}
    for round in range(2):
        handicap = balance(usage, schedule.BALANCE * (1 - round / schedule.BALANCED))
        usage, sums = (schedule.server_decay(1.0) * value for value in (usage, sums))
        for client_id in run.dataset:
            losses = pure_losses(run, client_id)
            count = run.dataset.num_examples(client_id, "train")
            theta[client_id] = schedule.CLIENT_MEMORY * theta[client_id] - count * losses
            theta[client_id] -= theta[client_id].max()
            mixture = torch.softmax(theta[client_id].double() - handicap, dim=0)
            usage = usage + mixture
            sums = sums + torch.outer(mixture, losses.double())
    assert torch.allclose(torch.tensor(memory["usage"], dtype=torch.float64), usage, atol=1e-3)
    assert torch.allclose(torch.tensor(memory["losses"], dtype=torch.float64), sums, atol=1e-3)


def test_local_steps_leave_a_posterior_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(router_noise=1.0), rounds=1, **POSTERIOR)
    before = run.mixtures()[1]
    run.train()
    kept = torch.stack([run._store.get(k)[run._routers.name].flatten().softmax(0) for k in run.dataset])
    assert torch.allclose(kept, before, atol=1e-5)


def test_rounds_say_how_many_clients_have_switched(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(), learning_rate=0.0, rounds=2, **POSTERIOR)
    run.train()
    assert [record["switches"] for record in run.records] == [0, 0]  # nothing moves, and at first nobody had any


def test_a_resumed_run_ends_as_an_untroubled_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", rounds=4, clients_per_round=3, **POSTERIOR)
    whole.train()
    trainer(tmp_path / "b", rounds=2, clients_per_round=3, save_steps=2, **POSTERIOR).train()
    resumed = trainer(tmp_path / "b", rounds=4, clients_per_round=3, save_steps=2, **POSTERIOR)
    resumed.train(resume_from_checkpoint=True)
    for (name, value), other in zip(tensors(whole.model).items(), tensors(resumed.model).values(), strict=True):
        assert torch.equal(value, other), name


def test_clients_side_by_side_find_the_same(tmp_path: Path) -> None:
    runs = []
    for cohort in ("loop", "vectorized"):
        run = trainer(tmp_path / cohort, model=started(), rounds=2, cohort=cohort, **POSTERIOR)
        run.train()
        runs.append(tensors(run.model))
    for name, value in runs[0].items():
        assert torch.allclose(value, runs[1][name], atol=1e-4), name


def test_a_client_without_examples_stays_as_it_is(tmp_path: Path) -> None:
    clients = population()
    empty = dict(clients.items()) if hasattr(clients, "items") else {k: clients[k] for k in clients}
    empty["client 0"]["train"] = empty["client 0"]["train"].select([])
    from floral_peft.federated import FederatedDataset

    run = trainer(tmp_path, model=started(), dataset=FederatedDataset(empty), rounds=1, **POSTERIOR)
    assert torch.allclose(run.mixtures()[1][0], torch.full((2,), 0.5))
    run.train()
    assert list(run.records[0]["clients_dropped"]) == ["client 0"]


# Equal adaptors


def test_equal_adaptors_are_told_apart_and_the_model_stays_what_it_was() -> None:
    model = floral_net(num_adaptors=5)
    points = torch.randn(7, 4)
    before = model(points)
    assert separate_adaptors(model, 0.3, torch.Generator().manual_seed(0))
    assert torch.allclose(model(points), before, atol=1e-6)
    outputs = []
    for adaptor in range(5):
        model.set_routers(torch.where(torch.arange(5) == adaptor, 0.0, -1e4).view(1, 1, 5))
        outputs.append(model(points))
    distances = torch.cdist(torch.stack(outputs).flatten(1), torch.stack(outputs).flatten(1))
    assert bool((distances + torch.eye(5) > 1e-2).all())
    assert torch.allclose(outputs[4], before, atol=1e-6)  # the odd one


def test_adaptors_that_differ_are_left_as_they_are(tmp_path: Path) -> None:
    model = started()
    before = tensors(model)
    assert not separate_adaptors(model, 0.3, torch.Generator())
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())


def test_a_run_with_equal_adaptors_tells_them_apart_itself(tmp_path: Path) -> None:
    run = trainer(tmp_path, rounds=1, **POSTERIOR)
    run.train()
    assert len({tuple(row) for row in run.mixtures()[1].tolist()}) == 4


# Mirror descent


def test_the_mirrors_gradient_is_that_of_the_mixture(tmp_path: Path) -> None:
    model = started(num_adaptors=3).double()
    points, labels = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    logits = model.router.logits["default"]
    with torch.no_grad():
        logits.copy_(torch.tensor([[[0.3, -1.0, 0.8]]]))
    settings = model.router.settings["default"]
    model.router.settings["default"] = get_router_update(FederatedArguments(router_update="mirror")).settings(settings)
    loss = nn.functional.cross_entropy(model(points), labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    model.router.settings["default"] = settings
    plain = nn.functional.cross_entropy(model(points), labels)
    assert torch.allclose(loss, plain)
    (through,) = torch.autograd.grad(plain, logits)  # π_c (g_c − Σ_j π_j g_j)
    mixture = logits.detach().softmax(dim=-1)
    expected = through / mixture
    assert torch.allclose(gradient, expected - expected.mean(), atol=1e-9)


@pytest.mark.parametrize("cohort", ["loop", "vectorized"])
def test_mirror_descent_trains_routers_in_local_steps(tmp_path: Path, cohort: str) -> None:
    model = started(router_noise=1.0)
    run = trainer(tmp_path, model=model, rounds=1, cohort=cohort, router_update="mirror")
    run.train()
    assert len({tuple(row) for row in run.mixtures()[1].tolist()}) == 4
    assert model.router.settings["default"].noise == 1.0 and not model.router.settings["default"].straight_through


# The label prior


def test_the_label_prior_is_the_smoothed_histogram() -> None:
    prior = label_log_prior(torch.tensor([0, 0, 2, -100]), 3)
    assert torch.allclose(prior.exp(), torch.tensor([2.3, 0.3, 1.3]) / 3.9)


def test_clients_train_on_discounted_labels_and_are_evaluated_on_plain_logits(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(), rounds=1, local_steps=1, per_device_train_batch_size=99, **POSTERIOR)
    before = run.evaluate()["eval_loss"]
    losses = {k: pure_losses(run, k) for k in run.dataset}
    run.model.set_routers(torch.zeros(1, *run._routers.shape))
    run.train()
    assert min(v.min() for v in losses.values()) < run.records[-1]["train_loss"] < 3
    plain = trainer(tmp_path / "plain", model=started(), label_prior=False, rounds=1, **POSTERIOR)
    assert abs(plain.evaluate()["eval_loss"] - before) < 0.5


def test_a_loss_that_is_not_the_cross_entropy_is_left_alone(tmp_path: Path) -> None:
    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    for loss_fn, found in ((smoothed, 0), (nn.CrossEntropyLoss(), 3), (None, 3)):
        run = trainer(tmp_path, model=started(), loss_fn=loss_fn, **POSTERIOR)
        run.mixtures()
        assert run._forward._classes == found


def test_only_the_posterior_discounts_labels_by_itself(tmp_path: Path) -> None:
    assert not trainer(tmp_path, router_update="gradient")._forward.discount_labels
    assert trainer(tmp_path, label_prior=True)._forward.discount_labels
    assert not trainer(tmp_path, optimal_routing=True, **POSTERIOR)._forward.discount_labels
    with pytest.raises(ValueError, match="label_prior=True: MixtureForward"):
        trainer(tmp_path, "fedem", label_prior=True)


# Balance


def test_a_balance_is_nothing_where_usage_is_even_and_hinders_the_crowded() -> None:
    assert torch.allclose(balance(torch.full((3,), 7.0), 3.0), torch.zeros(3))
    crowded = balance(torch.tensor([9.0, 0.0, 0.0]), 2.0)
    assert torch.allclose(crowded, 2 * torch.log(torch.tensor([30 / 12, 3 / 12, 3 / 12])))


# What clients tell


def test_sums_are_checked() -> None:
    shapes = {"usage": torch.Size([2])}

    def check(sums: dict[str, Any]) -> None:
        update = ClientUpdate("a", 1, 3, None, {}, 0.5, sums)
        check_update(update, "a", 1, {}, None, shapes)

    check({"usage": torch.zeros(2, dtype=torch.float64)})
    for wrong, message in (
        ({}, r"sums of \[\], expected \['usage'\]"),
        ({"usage": torch.zeros(3, dtype=torch.float64)}, r"usage is \(3,\) torch.float64"),
        ({"usage": torch.zeros(2)}, "torch.float32"),
        ({"usage": [0.0, 0.0]}, "usage is list"),
        ({"usage": torch.full((2,), torch.nan, dtype=torch.float64)}, "not finite"),
    ):
        with pytest.raises(UpdateError, match=message):
            check(wrong)


def test_an_update_of_ones_own_is_one_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="registered already"):

        @register_router_update
        class Other(RouterUpdate):
            name = "posterior"

    with pytest.raises(ValueError, match=r"router_update='postreior' must be one of .*did you mean 'posterior'"):
        trainer(tmp_path, router_update="postreior")
