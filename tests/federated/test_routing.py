"""How clients find their routers: by local steps, or as a posterior over the adaptors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn

from floral_peft.federated import FederatedArguments, FederatedDataset, ServerState, Turn, UpdateError
from floral_peft.federated.aggregation import ClientUpdate, check_update
from floral_peft.federated.label_prior import label_log_prior
from floral_peft.federated.routing import RouterUpdate, get_router_update, posterior, register_router_update, schedule
from floral_peft.federated.routing.balance import balance
from floral_peft.federated.routing.posterior import hold_out
from floral_peft.federated.seeding import derive_seed

from .clients import StopAfter, examples, floral_net, net, population, tensors, trainer


POSTERIOR: dict[str, Any] = {"router_update": "posterior", "search_adaptors": 1, "search_r": 1}


def started(**config: Any) -> Any:
    """A model whose adaptors differ from the start."""
    return floral_net(init_std=0.7, **config)


def pure_losses(run: Any, client_id: str, discount: bool = True, data: Dataset | None = None) -> Tensor:
    """f_c of one client, on some or all of its examples, by the model's public interface."""
    data = run.dataset[client_id]["train"] if data is None else data
    points, labels = torch.tensor(data["points"][:]), torch.tensor(data["labels"][:])
    counts = torch.bincount(torch.tensor(run.dataset[client_id]["train"]["labels"][:]), minlength=3) + 0.3
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


def dealt(run: Any, client_id: str) -> Tensor:
    """θ of a client that comes for the first time, in the first round."""
    adaptor = run._clients.lots(list(run.dataset), 1)[client_id] % 2
    return schedule.ASSIGNED * nn.functional.one_hot(torch.tensor(adaptor), 2).float()


def test_every_adaptor_is_dealt_out_to_as_many_clients(tmp_path: Path) -> None:
    run = trainer(tmp_path, clients_per_round=2)
    lots = [run._clients.lots(["client 0", "client 3"], round) for round in (1, 2)]
    assert [sorted(numbers.values()) for numbers in lots] == [[0, 1], [2, 3]]
    assert {run._clients.lots(["a", "b"], round)["a"] % 2 for round in range(9)} == {0, 1}


def two_rounds(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """A run over two rounds of four in which nothing is learned, and what the server remembers.

    With two epochs, looking under two adaptors costs no more than a third of training: clients look at each visit.
    """
    run = trainer(folder, model=started(), learning_rate=0.0, local_epochs=2, rounds=4, save_steps=2, **POSTERIOR)
    run.callback_handler.add_callback(StopAfter(2))
    run.train()
    memory = json.loads((folder / "checkpoint-2/server/state.json").read_bytes())["routing"]
    return run, {name: torch.tensor(value, dtype=torch.float64) for name, value in memory.items()}


def expected(run: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """θ of each client after these rounds, and what the server should remember."""
    memory = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in run._update.sums(2).items()}
    theta = {client_id: dealt(run, client_id) for client_id in run.dataset}
    for round in range(2):
        handicap = balance(memory["usage"], schedule.BALANCE * (1 - round / schedule.BALANCED))
        known = memory
        optimism = (memory["optimism"] / memory["usage"].sum().clamp(min=1e-9)).clamp(min=0).float()
        memory = {name: schedule.server_decay(1.0) * value for name, value in memory.items()}
        for client_id in run.dataset:
            data, before = run.dataset[client_id]["train"], theta[client_id]
            kept_back, others = hold_out(len(data), derive_seed(42, "held out", client_id))
            seen = pure_losses(run, client_id, data=data.select(others))
            told = pure_losses(run, client_id, data=data.select(kept_back)).double()
            if round < schedule.held_out_from(1.0, 4):
                told = seen.double()
            own = optimism * torch.softmax(before, dim=0) if round else 0
            after = schedule.CLIENT_MEMORY * before - min(len(others), schedule.EARLY_EXAMPLES) * (seen + own)
            mixture = torch.softmax(after.double() - handicap, dim=0)
            memory["usage"] += mixture
            memory["losses"] += torch.outer(mixture, told)
            memory["squares"] += mixture[:, None] * (told[None, :] - told[:, None]) ** 2
            memory["optimism"] += (mixture * (told - seen.double())).sum()
            moved = not run._update._alike(int(before.argmax()), int(after.argmax()), known)
            memory["switches"] += round * float(moved)
            memory["visits"] += 1
            theta[client_id] = after - after.max()
    return theta, memory


@pytest.fixture(params=[0.0, schedule.HELD_OUT_FROM, 60.0])
def held_out_from(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Clients look at what they hold out from the first round on, from the second, or never."""
    first: float = request.param
    monkeypatch.setattr(schedule, "HELD_OUT_FROM", first)
    monkeypatch.setattr(schedule, "EVIDENCE_EARLY", 8)  # clients have 12
    return first


@pytest.mark.usefixtures("held_out_from")
def test_a_client_keeps_its_posterior_without_the_balance_and_remembers_little_of_it(tmp_path: Path) -> None:
    run, _ = two_rounds(tmp_path)
    for client_id, theta in expected(run)[0].items():
        assert torch.allclose(run._store.get(client_id)[run._routers.name].flatten(), theta, atol=1e-3)


def test_the_server_remembers_fading_sums_over_clients(tmp_path: Path, held_out_from: float) -> None:
    run, memory = two_rounds(tmp_path)
    for name, value in expected(run)[1].items():
        assert torch.allclose(memory[name], value, atol=1e-3), name
    assert (float(memory["optimism"].abs()) > 0.01) is (held_out_from < 60)


@pytest.mark.parametrize(("loss", "leaves"), [(0.0, False), (9.0, True)])
def test_the_adaptor_that_a_client_has_trained_is_taken_to_be_worse_than_it_looks(
    tmp_path: Path, loss: float, leaves: bool
) -> None:
    run = trainer(tmp_path, model=started(), local_epochs=2, router_update="posterior")
    memory = {"usage": torch.ones(2), "optimism": torch.tensor([2 * loss])}
    state = ServerState.of(run.model, run._groups, run._update.start(2) | memory)
    with run._visit():
        private = run._clients.private("client 0")
        turn = run._clients.turn("client 0", private, 0, state)
        best = int(turn.pure_losses_of([torch.arange(12)])[0].argmin())
        logits = torch.zeros(1, 1, 2)
        logits[..., best] = 5.0
        turn.private = {**private, run._routers.name: logits}
        kept = int(run._arrivals(turn).kept[run._routers.name].argmax())
    assert (kept != best) is leaves


def test_where_looking_is_dear_clients_look_in_every_second_round_and_keep_their_routers_in_the_others(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path, model=started(), learning_rate=0.0, rounds=60, **POSTERIOR)  # one epoch, two adaptors
    memory = run._update.start(2) | {"usage": torch.tensor([3.0, 1.0])}
    state = ServerState.of(run.model, run._groups, memory)
    zeros = run._update.start(2)
    looked: list[list[bool]] = []
    with run._visit():
        for round in range(6):
            looked.append([])
            for client_id in run.dataset:
                private = run._clients.private(client_id)
                before = torch.tensor([[[0.0, -0.3]]])
                turn = run._clients.turn(client_id, {**private, run._routers.name: before}, round, state)
                arrived = run._arrivals(turn)
                kept, works = arrived.kept[run._routers.name], arrived.private[run._routers.name]
                looked[-1].append(not torch.equal(kept, before))
                assert looked[-1][-1] is bool(run._update.examined(turn))
                assert float(arrived.sums["visits"]) == 1
                assert float(arrived.sums["usage"].sum()) == pytest.approx(float(looked[-1][-1]))
                assert len(arrived.trains_on) == turn.num_examples - 1  # held out in the search
                if not looked[-1][-1]:
                    handicap = balance(memory["usage"], schedule.BALANCE * (1 - round / schedule.BALANCED))
                    assert torch.allclose(works.softmax(-1), (before - handicap).softmax(-1).float())
                    assert all(torch.equal(arrived.sums[name], zeros[name]) for name in zeros if name != "visits")
    assert looked[0] == looked[2] == looked[4] and looked[1] == looked[3] == looked[5]
    assert looked[1] == [not one for one in looked[0]]


@pytest.mark.parametrize(
    ("settings", "looks"),
    [
        ({}, 1),
        ({"local_epochs": 2}, 2),
        ({"optimizer": "adamw"}, 2),
        ({"rounds": 59}, 2),
        ({"clients_per_round": 3}, 2),
    ],
)
def test_whoever_trains_much_or_by_adamw_or_comes_seldom_or_has_no_router_yet_looks_at_each_visit(
    tmp_path: Path, settings: dict[str, Any], looks: int
) -> None:
    run = trainer(tmp_path, model=started(), **({"rounds": 60} | settings), **POSTERIOR)
    state = ServerState.of(run.model, run._groups, run._update.start(2))
    with run._visit():
        private = run._clients.private("client 0")
        rounds = [run._clients.turn("client 0", private, round, state) for round in (0, 1)]
        assert all(run._update.examined(turn) for turn in rounds)
        chosen = {**private, run._routers.name: torch.tensor([[[0.0, -9.0]]])}
        rounds = [run._clients.turn("client 0", chosen, round, state) for round in (0, 1)]
        assert sum(bool(run._update.examined(turn)) for turn in rounds) == looks
        evaluated = [run._clients.turn("client 0", chosen, round) for round in (0, 1)]
        assert all(run._update.examined(turn) for turn in evaluated)


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 0), (3, 1), (29, 2), (200, 10)])
def test_a_tenth_of_the_examples_is_held_out_and_always_the_same(count: int, held: int) -> None:
    held_out, others = hold_out(count, seed=7)
    posterior._held_out.cache_clear()
    assert len(held_out) == held and torch.equal(hold_out(count, seed=7)[0], held_out)
    assert torch.equal(torch.cat([held_out, others]).sort().values, torch.arange(count))


@pytest.mark.parametrize("round", [0, 30, 149])
def test_until_the_search_ends_clients_do_not_train_on_what_is_held_out(tmp_path: Path, round: int) -> None:
    run = trainer(tmp_path, model=started(), rounds=300, **POSTERIOR)
    searching = run._update.start(2)
    for memory, trained in ((searching, 11), (run._update.settled(searching, round), 12)):
        state = ServerState.of(run.model, run._groups, memory)
        with run._visit():
            turn = run._clients.turn("client 0", run._clients.private("client 0"), round, state)
            assert len(run._arrivals(turn).trains_on) == trained


@pytest.mark.parametrize(("count", "looked_at"), [(16, [1, 15]), (17, [16])])
def test_who_has_few_examples_looks_at_those_held_out_from_the_first_round(
    tmp_path: Path, count: int, looked_at: list[int]
) -> None:
    data = {"points": torch.randn(count, 4).tolist(), "labels": [0] * count}
    clients = FederatedDataset({k: {"train": Dataset.from_dict(data)} for k in range(2)})
    run = trainer(tmp_path, model=started(), dataset=clients, rounds=60, **POSTERIOR)
    state = ServerState.of(run.model, run._groups, run._update.start(2))
    with run._visit():
        turn = run._clients.turn(0, run._clients.private(0), 0, state)
        assert [len(part) for part in run._update.examined(turn)] == looked_at


def test_who_has_one_adaptor_holds_nothing_out(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=floral_net(num_adaptors=1), rounds=300, **POSTERIOR)
    state = ServerState.of(run.model, run._groups, run._update.start(1))
    with run._visit():
        turn = run._clients.turn("client 0", run._clients.private("client 0"), 0, state)
        assert len(run._arrivals(turn).trains_on or turn.examples) == 12


def test_losses_are_looked_at_on_so_many_examples_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(schedule, "EVIDENCE_EXAMPLES", 5)

    def losses(turn: Turn, parts: list[Tensor]) -> list[Tensor]:
        seen.append([len(part) for part in parts])
        return [torch.zeros(2) for _ in parts]

    monkeypatch.setattr(Turn, "pure_losses_of", losses)
    trainer(tmp_path, model=started(), **POSTERIOR).mixtures()
    assert seen == [[5]] * 4


@pytest.mark.parametrize(
    ("trained", "adaptors", "looked_at"), [(10, 8, 32), (125, 16, 32), (200, 4, 50), (10_000, 4, 256)]
)
def test_looking_costs_a_third_of_training_if_that_is_enough(trained: int, adaptors: int, looked_at: int) -> None:
    assert schedule.evidence_examples(trained, adaptors) == looked_at


def test_clients_with_many_examples_look_at_some_of_them_before_they_train(tmp_path: Path) -> None:
    data = {"points": torch.randn(200, 4).tolist(), "labels": [0] * 200}
    clients = FederatedDataset({k: {"train": Dataset.from_dict(data)} for k in range(2)})
    run = trainer(tmp_path, model=started(), dataset=clients, rounds=1, **POSTERIOR)
    state = ServerState.of(run.model, run._groups, run._update.start(2))
    with run._visit():
        training = run._clients.turn(0, run._clients.private(0), 10, state)
        evaluated = run._clients.turn(0, run._clients.private(0), 0)
        assert [len(part) for part in run._update.examined(training)] == [10, 95]
        assert [len(part) for part in run._update.examined(evaluated)] == [200]


@pytest.mark.parametrize(
    ("settings", "round", "looked_at"),
    [
        ({}, 0, [16]),
        ({}, 10, [10, 16]),
        ({}, 20, [10, 32]),
        ({"optimizer": "adamw"}, 0, [10, 16]),
        ({"rounds": 12}, 1, [16]),
        ({"rounds": 12}, 2, [10, 16]),
    ],
)
def test_in_the_first_rounds_they_look_at_few_and_by_sgd_at_none_that_is_held_out(
    tmp_path: Path, settings: dict[str, Any], round: int, looked_at: list[int]
) -> None:
    data = {"points": torch.randn(200, 4).tolist(), "labels": [0] * 200}
    clients = FederatedDataset({k: {"train": Dataset.from_dict(data)} for k in range(2)})
    settings = {"rounds": 59, "local_steps": 1} | settings | POSTERIOR
    run = trainer(tmp_path, model=started(), dataset=clients, **settings)
    state = ServerState.of(run.model, run._groups, run._update.start(2))
    with run._visit():
        turn = run._clients.turn(0, run._clients.private(0), round, state)
        assert [len(part) for part in run._update.examined(turn)] == looked_at


def test_local_steps_leave_a_posterior_alone(tmp_path: Path) -> None:
    kept = []
    for rate in (0.1, 9.0):
        run = trainer(tmp_path / str(rate), model=started(), rounds=1, router_learning_rate=rate, **POSTERIOR)
        run.train()
        kept.append(torch.stack([run._store.get(k)[run._routers.name] for k in run.dataset]))
    assert torch.equal(*kept)


def test_squared_errors_are_judged_by_their_profile_likelihood(tmp_path: Path) -> None:
    found = []
    for unit in (1.0, 1000.0):
        data = {"points": torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).tolist()}
        data["labels"] = [[unit * sum(row), -unit * row[0], 0.0] for row in data["points"]]
        clients = FederatedDataset({"a": DatasetDict(train=Dataset.from_dict(data))})
        base: Any = net()
        base[2].weight.data *= unit
        base[2].bias.data *= unit
        model = floral_net(base, init_std=0.7, num_adaptors=3)
        model.base_model.model[2].floral_B["default"].data *= unit
        run = trainer(tmp_path / str(unit), model=model, dataset=clients, loss_fn=nn.functional.mse_loss, **POSTERIOR)
        found.append(run.mixtures()[1])
        losses = torch.stack([pure_mse(run, data, adaptor) for adaptor in range(3)])
        assert torch.allclose(found[-1][0], torch.softmax(-9 * 3 / 2 * losses.log(), dim=0), atol=1e-4)
    assert torch.allclose(found[0], found[1], atol=1e-4)


def pure_mse(run: Any, data: dict[str, Any], adaptor: int) -> Tensor:
    run.model.set_routers(torch.where(torch.arange(3) == adaptor, 0.0, -1e4).view(1, 1, 3), ["a"])
    with run.model.client("a"), torch.no_grad():
        return nn.functional.mse_loss(run.model(torch.tensor(data["points"])), torch.tensor(data["labels"]))


def test_rounds_say_how_many_clients_have_switched(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(), learning_rate=0.0, rounds=5, **POSTERIOR)
    run.train()
    switches = [record["switches"] for record in run.records]
    assert switches[0] == 0  # nobody had an adaptor before
    assert switches[-1] == 0  # nothing moves any more


def test_a_resumed_run_ends_as_an_untroubled_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", rounds=4, clients_per_round=3, **POSTERIOR)
    whole.train()
    first = trainer(tmp_path / "b", rounds=4, clients_per_round=3, save_steps=2, **POSTERIOR)
    first.callback_handler.add_callback(StopAfter(2))
    first.train()
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


@pytest.mark.parametrize("cohort", ["loop", "vectorized"])
def test_examples_that_are_not_finite_cost_nobody_but_their_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cohort: str
) -> None:
    clients = population(5, num_examples=20)
    sick = DatasetDict(clients["client 1"])
    sick["train"] = sick["train"].map(lambda one: {"points": [math.nan, *one["points"][1:]]})
    dataset = FederatedDataset({**clients, "client 1": sick})
    settings = POSTERIOR | {"per_device_eval_batch_size": 64}  # several clients share a pass
    run = trainer(tmp_path, model=started(), dataset=dataset, rounds=4, cohort=cohort, **settings)
    run.train()
    rounds = [record for record in run.records if record["event"] == "round"]
    assert [list(record["clients_dropped"]) for record in rounds] == [["client 1"]] * 4
    mixtures = dict(zip(*run.mixtures(), strict=True))
    assert mixtures.pop("client 1").tolist() == [0.5, 0.5]  # the router that it had
    assert all(0.9 < float(mixture.max()) <= 1 for mixture in mixtures.values())
    assert math.isfinite(run.evaluate()["eval_loss"]) and len(run.client_metrics) == 5
    told = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert told and all("client 'client 1': " in line for line in told)
    with pytest.raises(ValueError, match=r"client 'new client': its losses .* not finite"):
        run.personalize(sick["train"])
    with pytest.raises(ValueError, match=r"client 'new client': its losses .* not finite"):
        run.personalize(sick["train"].remove_columns("labels"))


@pytest.mark.parametrize("method", ["ifca", "fedem", "ensemble"])
def test_nor_do_they_with_methods_of_several_models(tmp_path: Path, method: str) -> None:
    clients = population(4, num_examples=20)
    sick = DatasetDict(clients["client 1"])
    sick["train"] = sick["train"].map(lambda one: {"points": [math.nan, *one["points"][1:]]})
    dataset = FederatedDataset({**clients, "client 1": sick})
    run = trainer(tmp_path, method, dataset=dataset, rounds=2, per_device_eval_batch_size=64, **POSTERIOR)
    run.train()
    rounds = [record for record in run.records if record["event"] == "round"]
    assert [list(record["clients_dropped"]) for record in rounds] == [["client 1"]] * 2
    assert bool(run.mixtures()[1].isfinite().all()) and math.isfinite(run.evaluate()["eval_loss"])


def test_a_model_under_which_a_loss_is_infinite_is_never_chosen(tmp_path: Path) -> None:
    run = trainer(tmp_path, "ifca", loss_fn=lambda outputs, labels: outputs.square().mean(), rounds=1)
    with torch.no_grad():
        run.model.members[1][2].weight.fill_(1e25)
    run.train()
    assert [record["clients_dropped"] for record in run.records if record["event"] == "round"] == [{}]
    assert run.mixtures()[1].tolist() == [[1.0, 0.0]] * len(run.dataset)


def test_examples_without_labels_take_no_part_in_what_the_others_tell(tmp_path: Path) -> None:
    clients = population(2, num_examples=12)
    some = DatasetDict(clients["client 0"])
    some["train"] = some["train"].map(
        lambda one, row: {"labels": -100 if row % 2 else one["labels"]}, with_indices=True
    )
    dataset = FederatedDataset({**clients, "client 0": some})
    run = trainer(tmp_path, model=started(), dataset=dataset, **POSTERIOR, per_device_eval_batch_size=1)
    with run._visit():
        turn = run._clients.turn("client 0", run._clients.private("client 0"), 0)
        (found,) = turn.pure_losses_of([torch.arange(12)])
        (half,) = turn.pure_losses_of([torch.arange(0, 12, 2)])
    assert bool(found.isfinite().all()) and torch.allclose(found, half)


def test_several_new_clients_do_not_wait_for_one_that_cannot_be_personalized(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(), rounds=1, **POSTERIOR)
    run.train()
    bad = [{"points": [math.nan] * 4, "labels": 0}]
    with pytest.raises(ValueError, match="client 'bad': its losses"):
        run.personalize({"bad": bad, "good": examples(5)})
    assert float(run.model.mixture("good").sum()) == pytest.approx(1.0)


def test_what_is_held_out_tells_nothing_where_it_is_not_finite(tmp_path: Path) -> None:
    clients = population(2, num_examples=20)
    held_out = hold_out(20, derive_seed(42, "held out", "client 0"))[0].tolist()
    some = DatasetDict(clients["client 0"])
    some["train"] = some["train"].map(
        lambda one, row: {"points": [math.nan, *one["points"][1:]]} if row in held_out else one, with_indices=True
    )
    dataset = FederatedDataset({**clients, "client 0": some})
    run = trainer(tmp_path, model=started(), dataset=dataset, rounds=100, **POSTERIOR)
    state = ServerState.of(run.model, run._groups, run._update.start(2))
    with run._visit():
        turn = run._clients.turn("client 0", run._clients.private("client 0"), 50, state)
        found = run._arrivals(turn)
    assert len(held_out) and found.trains_on is not None and len(found.trains_on) == 20 - len(held_out)
    assert all(bool(value.isfinite().all()) for value in found.sums.values())


def test_a_client_without_examples_stays_as_it_is(tmp_path: Path) -> None:
    empty = DatasetDict(train=examples(0), test=examples(3))
    clients = FederatedDataset({"a": empty, "b": DatasetDict(train=examples(5), test=examples(3))})
    run = trainer(tmp_path, model=started(), dataset=clients, rounds=1, **POSTERIOR)
    assert torch.allclose(run.mixtures()[1][0], torch.full((2,), 0.5))
    run.train()
    assert list(run.records[0]["clients_dropped"]) == ["a"]


# Equal adaptors


def test_adaptors_that_start_equal_come_to_differ(tmp_path: Path) -> None:
    run = trainer(tmp_path, rounds=3, **POSTERIOR)
    assert torch.allclose(run.mixtures()[1], torch.full((4, 2), 0.5))  # nobody has trained: the model is the base
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
    prior = label_log_prior(np.array([0, 0, 2, -100]), 3)
    assert torch.allclose(prior.exp(), torch.tensor([2.3, 0.3, 1.3]) / 3.9)
    assert torch.equal(label_log_prior(np.array([0, 0, 2], np.uint64), 3), prior)


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
    assert not trainer(tmp_path, router_update="gradient")._forward.discounting
    assert trainer(tmp_path, label_prior=True)._forward.discounting
    assert not trainer(tmp_path, optimal_routing=True, **POSTERIOR)._forward.discounting
    with pytest.raises(ValueError, match="label_prior=True: MixtureForward"):
        trainer(tmp_path, "fedem", label_prior=True)


# Balance


def test_a_balance_is_nothing_where_usage_is_even_and_hinders_the_crowded() -> None:
    assert torch.allclose(balance(torch.full((3,), 7.0), 3.0), torch.zeros(3))
    crowded = balance(torch.tensor([9.0, 0.0, 0.0]), 2.0)
    assert torch.allclose(crowded, 2 * torch.log(torch.tensor([30 / 12, 3 / 12, 3 / 12])))


# Health


def test_routers_that_stay_uniform_are_told_with_a_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path / "a", rounds=7, router_update="gradient", learning_rate=0.0).train()
    assert caplog.text.count("still uniform; adaptors that start equal give routers no gradient") == 1
    caplog.clear()
    trainer(tmp_path / "b", rounds=7, model=started(), **POSTERIOR).train()
    assert "uniform" not in caplog.text


def test_rounds_say_what_adaptors_are_to_each_others_users(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(num_adaptors=3), rounds=1, **POSTERIOR)
    run.train()
    found = torch.tensor(run.records[0]["regrets"])
    assert found.shape == (3, 3) and not found.diagonal().any()
    assert trainer(tmp_path / "b", rounds=1).train() and run.records[0]["pruned"] == []


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
