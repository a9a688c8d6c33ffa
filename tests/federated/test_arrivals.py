"""Clients that arrive together look at their examples together, and find what each would find alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import TrainerCallback

from floral_peft.federated import FederatedDataset, ServerState
from floral_peft.federated import clients as clients_module
from floral_peft.federated.turn import Arrived, Turn
from floral_peft.tuner import PureModels

from .clients import floral_net, net, population, tensors, trainer


POSTERIOR: dict[str, Any] = {"router_update": "posterior", "search_adaptors": 2, "search_r": 2}


def started(**config: Any) -> Any:
    """A model whose adaptors differ from the start."""
    return floral_net(init_std=0.7, **config)


def regression(num_clients: int = 5) -> FederatedDataset:
    generator = torch.Generator().manual_seed(5)
    clients = {}
    for k in range(num_clients):
        points = torch.randn(7 + k, 4, generator=generator)
        labels = torch.stack([points.sum(dim=1), points[:, 0], points[:, 1]], dim=1) * (1 - 2 * (k % 2))
        data = Dataset.from_dict({"points": points.tolist(), "labels": labels.tolist()})
        clients[f"client {k}"] = DatasetDict(train=data, test=data)
    return FederatedDataset(clients)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passes each look at pure models takes, as they come."""
    found: list[int] = []
    look = PureModels.losses

    def counted(self: Any, loss: Any, batches: Any) -> Any:
        held = list(batches)
        found.append(len(held))
        return look(self, loss, held)

    monkeypatch.setattr(PureModels, "losses", counted)
    return found


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module, "GROUP", 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_prior": False},
        {"label_prior": False, "loss_fn": nn.functional.cross_entropy},
        {"per_device_eval_batch_size": 3},
        {"dataset": regression(), "loss_fn": nn.functional.mse_loss},
    ],
    ids=["classifier", "without label prior", "loss function", "small batches", "regression"],
)
@pytest.mark.parametrize("config", [{}, {"router_per_layer": True, "num_adaptors": 2}], ids=["", "by layer"])
def test_together_they_find_what_each_finds_alone(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, together = trainer(tmp_path, model=started(**config), **POSTERIOR, **settings).mixtures()
    alone(monkeypatch)
    _, one_by_one = trainer(tmp_path, model=started(**config), **POSTERIOR, **settings).mixtures()
    assert len(ids) > 3 and torch.allclose(together, one_by_one, atol=1e-5)
    assert together.std(dim=0).max() > 1e-3  # or there would be nothing to mistake


def test_labels_that_the_loss_leaves_out_count_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(data: Dataset) -> Dataset:
        return data.map(
            lambda example, row: {"labels": -100 if row % 3 == 0 else example["labels"]}, with_indices=True
        )

    clients = population()
    dataset = FederatedDataset({k: DatasetDict(train=marked(clients[k]["train"])) for k in clients})
    _, together = trainer(tmp_path, model=started(), dataset=dataset, **POSTERIOR).mixtures()
    alone(monkeypatch)
    _, one_by_one = trainer(tmp_path, model=started(), dataset=dataset, **POSTERIOR).mixtures()
    assert torch.isfinite(together).all() and torch.allclose(together, one_by_one, atol=1e-5)


def test_a_round_side_by_side_takes_one_look_and_so_does_its_end(tmp_path: Path, looks: list[int]) -> None:
    trainer(tmp_path, model=started(), rounds=3, cohort="vectorized", **POSTERIOR).train()
    assert looks == [1, 1, 1, 1]


@pytest.mark.parametrize("cohort", ["loop", "vectorized"])
def test_after_training_the_model_holds_the_routers_that_fit_its_adaptors_of_now(tmp_path: Path, cohort: str) -> None:
    run = trainer(tmp_path, model=started(), rounds=3, clients_per_round=1, cohort=cohort, **POSTERIOR)
    run.train()
    ids, mixtures = run.mixtures()
    visited = set(run._store.clients())
    assert visited < set(ids)  # the others have never trained
    held = torch.stack([run.model.mixture(client_id) for client_id in ids])
    assert torch.equal(held, mixtures)
    kept = run._clients.kept_routers(run._routers.name)
    stale = [torch.softmax(logits[0, 0], dim=-1) for logits in kept.values()]
    assert not torch.allclose(torch.stack(stale), held[[ids.index(client_id) for client_id in kept]], atol=1e-3)


def test_after_training_a_client_that_cannot_look_holds_the_router_of_its_last_visit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, model=started(), rounds=2, cohort="loop", **POSTERIOR)
    arrive = run._arrivals.arrival
    assert arrive is not None

    def fails(turn: Turn) -> Arrived:
        if turn.client_id == "client 1":
            raise OSError("unreadable")
        return arrive(turn)

    class Breaks(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            run._arrivals.arrival = fails

    run.callback_handler.add_callback(Breaks())
    run.train()
    assert "client 'client 1': OSError: unreadable; its router is the one that it had" in caplog.text
    kept = run._clients.kept_routers(run._routers.name)["client 1"]
    assert torch.allclose(run.model.mixture("client 1"), torch.softmax(kept[0, 0], dim=-1), atol=1e-6)


def test_an_evaluation_takes_one_look(tmp_path: Path, looks: list[int]) -> None:
    run = trainer(tmp_path, model=started(), **POSTERIOR)
    run.evaluate()
    assert looks == [1]


def test_as_many_examples_go_through_the_model_at_once_as_an_evaluation_batch_holds(
    tmp_path: Path, looks: list[int]
) -> None:
    run = trainer(tmp_path, model=started(), per_device_eval_batch_size=20, **POSTERIOR)
    run.evaluate()  # of clients with 12, 13, 14 and 15 examples
    assert looks == [4]


def test_a_run_side_by_side_is_a_run_in_turn_up_to_rounding(tmp_path: Path) -> None:
    def trained(cohort: str) -> tuple[dict[str, Tensor], Tensor]:
        run = trainer(tmp_path / cohort, model=started(), rounds=3, cohort=cohort, **POSTERIOR)
        run.train()
        return tensors(run.model), run.mixtures()[1]

    (one, mixtures), (other, others) = trained("loop"), trained("vectorized")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    assert torch.allclose(mixtures, others, atol=1e-3)


def test_a_client_whose_examples_cannot_be_read_costs_only_itself(tmp_path: Path) -> None:
    clients = population()
    ragged = Dataset.from_dict({"points": [[1.0] * 4, [1.0] * 3], "labels": [0, 1]})
    splits: dict[Any, Any] = {k: clients[k] for k in clients}
    splits["ragged"] = DatasetDict(train=ragged, test=clients["client 0"]["test"])
    run = trainer(tmp_path, model=started(), dataset=FederatedDataset(splits), **POSTERIOR)
    run.evaluate()
    assert sorted(run.client_metrics) == sorted(clients)


def test_clients_with_more_of_their_own_than_a_router_look_alone(tmp_path: Path, looks: list[int]) -> None:
    model = started(base=net(norm=True), adapt_norms="reparametrized")  # each client has running statistics
    run = trainer(tmp_path, model=model, **POSTERIOR)
    run.evaluate()
    assert looks == [1, 1, 1, 1]


def test_in_turn_clients_share_a_look_but_no_pass_and_find_the_same_bits(
    tmp_path: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: str) -> dict[str, Tensor]:
        run = trainer(tmp_path / folder, model=started(), rounds=3, cohort="loop", local_epochs=2, **POSTERIOR)
        run.train()
        return tensors(run.model)

    together = trained("together")
    assert looks[:3] == [4, 4, 4]
    alone(monkeypatch)
    looks.clear()
    one_by_one = trained("alone")
    assert looks[:12] == [1] * 12
    routers = together.pop(name := next(name for name in together if "router" in name)), one_by_one.pop(name)
    assert torch.allclose(*routers, atol=1e-4)  # found side by side at the end
    assert all(torch.equal(together[name], value) for name, value in one_by_one.items())


def test_a_client_whose_examples_cannot_be_read_does_not_make_the_others_look_alone(
    tmp_path: Path, looks: list[int]
) -> None:
    clients = population()
    ragged = Dataset.from_dict({"points": [[1.0] * 4, [1.0] * 3], "labels": [0, 1]})
    splits = {**{k: clients[k] for k in clients}, "ragged": DatasetDict(train=ragged)}
    run = trainer(tmp_path, model=started(), dataset=FederatedDataset(splits), rounds=1, cohort="loop", **POSTERIOR)
    run.train()
    assert looks[0] == 4


def test_a_client_with_a_wrong_example_changes_no_bit_of_what_others_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = population()
    wrong = Dataset.from_dict({"points": [[1.0] * 5] * 3, "labels": [0, 1, 2]})  # a feature too many
    splits = {"wrong": DatasetDict(train=wrong), **{k: clients[k] for k in clients}}

    def trained(folder: str) -> dict[str, Tensor]:
        dataset = FederatedDataset(splits)
        run = trainer(tmp_path / folder, model=started(), dataset=dataset, rounds=3, cohort="loop", **POSTERIOR)
        run.train()
        return tensors(run.model)

    together = trained("together")
    alone(monkeypatch)
    one_by_one = trained("alone")
    assert all(torch.equal(together[name], value) for name, value in one_by_one.items())


def test_examples_that_are_too_many_to_be_held_for_several_clients_are_held_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients_module, "RESIDENT_BYTES", 1000)  # a client has some 400 bytes
    run = trainer(tmp_path, model=started(), **POSTERIOR)
    with run._visit():
        private = {k: partial(run._clients.private, k) for k in run.dataset.ids}
        for groups, resident in ([[{k: own} for k, own in private.items()], True], [[private], False]):
            turns = run._clients.turns(groups, 0, ServerState.of(run.model, run._groups))
            assert all(turns(k).examples.resident == resident for k in private)
