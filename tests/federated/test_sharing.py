"""Clients of a frozen base notice when one adaptor for all of them is better than one each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn

from floral_peft.federated import FederatedDataset, ServerState
from floral_peft.federated.routing import schedule, sharing

from .clients import StopAfter, floral_net, tensors, trainer


T = sharing.TEMPERATURES
POSTERIOR: dict[str, Any] = {"router_update": "posterior", "search_adaptors": 6, "search_r": 3, "optimizer": "adamw"}


def population(contradicting: bool, num_clients: int = 6) -> FederatedDataset:
    """Few noisy examples each, of one rule for all; or half of the clients call class 0 what the others call 1."""
    generator = torch.Generator().manual_seed(3)
    clients = {}
    for k in range(num_clients):
        points = torch.randn(60, 4, generator=generator)
        sure = points[:, 0] + (0.0 if contradicting else 1.5) * torch.randn(60, generator=generator) > 0
        labels = sure.long() if not (contradicting and k % 2) else 1 - sure.long()
        data = Dataset.from_dict({"points": points.tolist(), "labels": labels.tolist()})
        clients[f"client {k}"] = DatasetDict(train=data.select(range(20)), test=data.select(range(20, 60)))
    return FederatedDataset(clients)


def run(folder: Path, contradicting: bool = False, resume: bool = False, stop: int | None = None, **more: Any) -> Any:
    settings = {"rounds": 10, "learning_rate": 0.2, "local_epochs": 2, **POSTERIOR} | more
    model = floral_net(num_adaptors=2, r=2, train_base=settings.pop("train_base", False))
    made = trainer(folder, model=model, dataset=population(contradicting), **settings)
    if stop is not None:
        made.callback_handler.add_callback(StopAfter(stop))
    made.train(resume_from_checkpoint=resume)
    return made


def pooled(made: Any) -> list[int]:
    """After which rounds adaptors have become one."""
    return [record["round"] for record in made.records if any(d["why"] == "pooled" for d in record.get("pruned", []))]


@pytest.mark.parametrize("cohort", ["loop", "vectorized"])
def test_clients_that_are_alike_come_to_share_one_adaptor(tmp_path: Path, cohort: str) -> None:
    made = run(tmp_path, cohort=cohort)
    assert pooled(made) and made._routers.shape[-1] == made.model.active_peft_config.num_adaptors == 1
    (record,) = (record for record in made.records if record["round"] == pooled(made)[0] and "pruned" in record)
    assert len(record["pruned"]) == len(record["usage"]) - 1 and record["lost"]
    assert {value.shape[1] for name, value in made.model.named_parameters() if "floral_A" in name} == {2}
    ids, mixtures = made.mixtures()
    assert mixtures.shape == (len(ids), 1)
    assert made.evaluate()["eval_accuracy"] > 0.55
    made.publish(tmp_path / "published")
    assert json.loads((tmp_path / "published/adapter_config.json").read_text())["num_adaptors"] == 1


def test_clients_that_contradict_each_other_do_not(tmp_path: Path) -> None:
    made = run(tmp_path, contradicting=True)
    assert pooled(made) == [] and made._routers.shape[-1] > 1


@pytest.mark.parametrize("settings", [{"train_base": True}, {"prune_adaptors": False}])
def test_where_the_base_learns_what_they_share_or_nothing_may_go_adaptors_stay(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert pooled(run(tmp_path, **settings)) == []


def test_a_run_goes_on_from_a_checkpoint_before_or_after_it(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    (when,) = pooled(whole)
    for until in (when - 1, when):
        folder = tmp_path / str(until)
        run(folder, stop=until, save_steps=until)
        resumed = tensors(run(folder, resume=True, save_steps=until).model)
        assert all(torch.equal(resumed[name], value) for name, value in tensors(whole.model).items())


def memory(own: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """What the server remembers of clients with these losses, (clients, T)."""
    told = [sharing.compared(one, other) for one, other in zip(own.double(), mean.double(), strict=True)]
    return {name: torch.stack([each[name] for each in told]).sum(dim=0) for name in sharing.SUMS}


def test_each_model_is_judged_at_the_temperature_that_is_best_for_it() -> None:
    """Own adaptors are too sure of themselves: at temperature 1 they lose, at 4 they win."""
    noise = 0.05 * torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([9.0, 6.0, 3.0, 1.5, 1.8, 2.0, 2.2]) + noise
    mean = torch.tensor([2.4, 2.2, 2.1, 2.15, 2.2, 2.25, 2.3]).expand(20, -1)
    clients = torch.tensor([20.0])
    assert not sharing.is_better(memory(own, mean), clients)
    assert sharing.is_better(memory(own + 1, mean), clients)


@pytest.mark.parametrize(("clients", "better"), [(4.0, False), (64.0, True)])
def test_it_takes_two_standard_errors(clients: float, better: bool) -> None:
    own = torch.full((4, len(T)), 2.0) + torch.tensor([-0.5, 0.5, -0.5, 0.5]).unsqueeze(1)
    assert sharing.is_better(memory(own, torch.full_like(own, 1.8)), torch.tensor([clients])) is better


def test_nobody_has_compared_so_nothing_is_better() -> None:
    assert not sharing.is_better(sharing.nothing(), torch.tensor([1e-9]))
    assert float(sharing.compared(None, None)["compared"]) == 0  # regression, say


def test_losses_at_temperatures_are_those_of_divided_outputs(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=floral_net(init_std=0.7), **POSTERIOR)
    state = ServerState.of(made.model, made._groups, made._update.start(2))
    rows, logits = torch.tensor([1, 4, 5]), torch.tensor([[[0.3, -0.4]]])
    with made._visit():
        turn = made._clients.turn("client 0", made._clients.private("client 0"), 0, state)
        found = turn.losses_at(T, rows, logits)
    data = made.dataset["client 0"]["train"].select(rows)
    points, labels = torch.tensor(data["points"][:]), torch.tensor(data["labels"][:])
    made.model.set_routers(logits)
    outputs = made.model(points)
    expected = torch.stack([nn.functional.cross_entropy(outputs / t, labels) for t in T])
    assert torch.allclose(found.float(), expected, atol=1e-5)


def test_examples_whose_labels_do_not_count_say_nothing(tmp_path: Path) -> None:
    clients = population(False)
    left_out = clients["client 0"]["train"].map(lambda example: {"labels": -100})
    splits: dict[Any, Any] = {**{k: clients[k] for k in clients}, "client 0": DatasetDict(train=left_out)}
    made = trainer(tmp_path, model=floral_net(init_std=0.7), dataset=FederatedDataset(splits), **POSTERIOR)
    state = ServerState.of(made.model, made._groups, made._update.start(2))
    with made._visit():
        turn = made._clients.turn("client 0", made._clients.private("client 0"), 0, state)
        assert turn.losses_at(T, torch.arange(3), torch.zeros(1, 1, 2)) is None


def one_logit(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.float())


@pytest.mark.parametrize("loss_fn", [one_logit, nn.functional.multi_margin_loss])
def test_another_loss_than_the_cross_entropy_is_not_judged_by_it(tmp_path: Path, loss_fn: Any) -> None:
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1 if loss_fn is one_logit else 3))
    model = floral_net(base=base, num_adaptors=2, r=2, train_base=False)
    settings: dict[str, Any] = {"rounds": 6, "learning_rate": 0.2, **POSTERIOR}
    made = trainer(tmp_path, model=model, dataset=population(False), loss_fn=loss_fn, **settings)
    made.train()
    assert all(record["clients_trained"] == 6 for record in made.records if record["event"] == "round")
    assert pooled(made) == []


def test_where_a_mixture_is_of_few_adaptors_nobody_compares(tmp_path: Path) -> None:
    model = floral_net(num_adaptors=3, r=2, train_base=False, router_top_k=2)
    settings: dict[str, Any] = {"rounds": 6, "learning_rate": 0.2, **POSTERIOR}
    made = trainer(tmp_path, model=model, dataset=population(False), **settings)
    made.train()
    assert pooled(made) == []


def test_in_a_short_run_it_is_decided_sooner() -> None:
    assert schedule.pooled_from(1.0, 300) == 15 and schedule.pooled_from(0.2, 300) == 75
    assert schedule.pooled_from(1.0, 30) == 7.5
