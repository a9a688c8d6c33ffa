"""Clients look for theirs among more adaptors than may stay, of a larger rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from floral_peft.cli.one_run import new_trainer
from floral_peft.cli.settings import read_settings
from floral_peft.federated import FederatedArguments
from floral_peft.federated.batches import Batch
from floral_peft.federated.forward import LABEL_PRIOR, Forward, Prediction
from floral_peft.federated.routing import get_router_update, schedule
from floral_peft.tasks.changes import rotate
from floral_peft.tasks.digits import digits_clients

from .clients import StopAfter, floral_net, tensors, trainer


SETTINGS: dict[str, Any] = {
    "router_update": "posterior",
    "search_r": 3,
    "search_adaptors": 5,
    "rounds": 6,
    "prune_adaptors": False,
}


def run(folder: Path, model: Any = None, resume: bool = False, **settings: Any) -> Any:
    made = trainer(folder, model=model or floral_net(r=1, num_adaptors=3), **(SETTINGS | settings))
    made.train(resume_from_checkpoint=resume)
    return made


def ranks(model: Any) -> set[int]:
    return {value.shape[1] for name, value in model.named_parameters() if "floral_A" in name}


def test_widened_adaptors_leave_the_model_what_it_was_and_come_back_without_loss() -> None:
    model = floral_net(r=2, init_std=0.5, rank_pattern={"2": 4})
    before, points = model.active_peft_config.to_dict(), torch.randn(5, 4)
    outputs = model(points)
    former = model.base_model.widen(3, seed=1)
    assert torch.allclose(model(points), outputs, atol=1e-6)
    assert ranks(model) == {3, 4} and model.active_peft_config.r == 3
    assert all(value < 1e-5 for value in model.base_model.narrow(former).values())
    assert torch.allclose(model(points), outputs, atol=1e-5)
    assert ranks(model) == {2, 4} and model.active_peft_config.to_dict() == before


def test_adaptors_are_compressed_half_way_and_the_records_say_what_is_lost(tmp_path: Path) -> None:
    made = run(tmp_path, search_adaptors=3)
    lost = {record["round"]: record["lost"] for record in made.records}
    assert [round for round, layers in lost.items() if layers] == [3]
    assert all(0 < value < 1 for value in lost[3].values()) and len(lost[3]) == 2
    assert ranks(made.model) == {1} and made.model.active_peft_config.r == 1
    sent = [record["bytes_up"] for record in made.records]
    assert len(set(sent)) == 2 and sent[3] < sent[2]


@pytest.mark.parametrize(
    ("num_adaptors", "clients", "searching"), [(4, 300, 16), (4, 10, 10), (8, 20, 16), (8, 50, 25), (30, 20, 30)]
)
def test_few_clients_search_among_few_adaptors(
    tmp_path: Path, num_adaptors: int, clients: int, searching: int
) -> None:
    update = get_router_update(FederatedArguments(output_dir=str(tmp_path)))
    assert update.search_adaptors(num_adaptors, clients) == searching


@pytest.mark.parametrize(
    ("rate", "fast", "longest"),
    [(0.01, 0.06, 1.0), (0.1, 0.6, 1.0), (0.4, 2.4, 1 / 2.4), (1.0, 2.5, 0.4), (4.0, 4.0, 1 / 16), (0.0, 0.0, 1.0)],
)
def test_no_step_of_an_adaptor_is_long_at_a_high_rate(
    tmp_path: Path, rate: float, fast: float, longest: float
) -> None:
    args = FederatedArguments(output_dir=str(tmp_path), learning_rate=rate)
    settled = get_router_update(args).settle(args, {}, 0)
    assert settled.adaptor_learning_rate == pytest.approx(fast)
    assert settled.step_norms == pytest.approx((longest * max(1, rate), longest))


@pytest.mark.parametrize(
    ("rate", "given", "at_once", "at_the_end"),
    [
        (0.01, None, (6.0, 2.0), (36.0, 12.0)),
        (0.1, None, (5.0, 1 / 0.6), (30.0, 10.0)),
        (1.2, None, (1.2, 1 / 3), (7.2, 1 / 1.44)),
        (4.0, None, (0.75, 1 / 16), (4.5, 1 / 16)),
        (4.0, 0.1, (6.0, 2.0), (36.0, 2.0)),  # slow adaptors make no long steps
    ],
)
def test_after_the_search_gradients_may_be_longer_and_ever_longer(
    tmp_path: Path, rate: float, given: float | None, at_once: tuple[float, float], at_the_end: tuple[float, float]
) -> None:
    args = FederatedArguments(output_dir=str(tmp_path), learning_rate=rate, adaptor_learning_rate=given, rounds=100)
    update = get_router_update(args)
    memory = update.settled(update.start(4), 40)
    assert update.settle(args, memory, 40).step_norms == pytest.approx(at_once)
    assert update.settle(args, memory, 100).step_norms == pytest.approx(at_the_end)


@pytest.mark.parametrize(("rate", "scale"), [("1.2", 1.0), ("0.4", 4.0)])
def test_a_rate_that_fedavg_bears_well_is_none_at_which_floral_diverges(
    tmp_path: Path, rate: str, scale: float
) -> None:
    def change(images: torch.Tensor, labels: torch.Tensor, cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
        return scale * rotate(images, labels, cluster)[0], labels

    settings = read_settings(["--task", "digits", "--learning_rate", rate, "--rounds", "30", "--eval_steps", "30"])
    accuracy = {}
    for method in ("fedavg", "floral"):
        args = replace(settings.federated, output_dir=str(tmp_path / method))
        made = new_trainer(settings, method, digits_clients(42, change), args, lenient=False)
        made.train()
        accuracy[method] = made.evaluate()["eval_accuracy"]
    assert accuracy["floral"] > accuracy["fedavg"] > 0.8  # before rates and steps were bounded: .13 and .17


@pytest.mark.parametrize(
    ("switches", "most", "prunes", "ends"),
    [(0.5, 4, True, 30), (1.5, 4, True, 50), (0.5, 3, True, 50), (0.5, 3, False, 30)],
)
def test_a_search_goes_on_while_clients_change_their_adaptors_or_have_more_than_may_stay(
    tmp_path: Path, switches: float, most: int, prunes: bool, ends: int
) -> None:
    args = FederatedArguments(output_dir=str(tmp_path), rounds=100, prune_adaptors=prunes)
    update = get_router_update(args)
    means = torch.full((4, 4), 3.0).fill_diagonal_(0.0)
    if switches > 1:  # another is better
        means = means.fill_diagonal_(1.0) - 3 * torch.eye(4).roll(1, 1)
    memory = {"usage": torch.full((4,), 2.5), "losses": 2.5 * means, "switches": torch.tensor([switches])}
    assert [round for round in range(1, 101) if update.searched(memory, round, most)] == list(range(ends, 101))
    assert not update.searched(update.settled(memory, ends), 100, most)  # it ends once


@pytest.mark.parametrize(
    ("other", "own", "most", "ends"),
    [(0.18, 0.0, 2, 40), (0.22, 0.0, 2, 50), (0.0, 0.09, 2, 40), (0.0, 0.11, 2, 50), (0.18, 0.0, 4, 50)],
    ids=["enough", "one is needed", "enough and all but found", "not found yet", "no more than may stay"],
)
def test_a_search_ends_early_once_those_that_may_stay_serve_all_users_as_well(
    tmp_path: Path, other: float, own: float, most: int, ends: int
) -> None:
    # Adaptors 0 and 1, 2 and 3 are of one cluster each, and half of the clients change theirs at each visit.
    update = get_router_update(FederatedArguments(output_dir=str(tmp_path), rounds=100))
    one = torch.tensor([[own, other], [other, own]], dtype=torch.float64)
    losses = 2.5 * torch.block_diag(one, one) + 2.5 * (1 + own) * (1 - torch.block_diag(*[torch.ones(2, 2)] * 2))
    memory = {"usage": torch.full((4,), 2.5), "losses": losses, "switches": torch.tensor([5.0])}
    assert [round for round in range(1, 101) if update.searched(memory, round, most)] == list(range(ends, 101))


@pytest.mark.parametrize("losses", [torch.eye(4), torch.ones(4, 4)], ids=["their worst", "all the same"])
def test_a_search_does_not_end_early_where_no_adaptor_is_found(tmp_path: Path, losses: torch.Tensor) -> None:
    update = get_router_update(FederatedArguments(output_dir=str(tmp_path), rounds=100))
    memory = {"usage": torch.full((4,), 2.5), "losses": losses, "switches": torch.tensor([5.0])}
    assert not update.searched(memory, 49, 2)


def test_after_the_search_the_loss_is_plain_and_adaptors_slow_down_to_the_bases_rate(tmp_path: Path) -> None:
    args = FederatedArguments(output_dir=str(tmp_path), learning_rate=0.1, rounds=100)
    update = get_router_update(args)
    memory = update.settled(update.start(4), 40)
    searching = update.settle(args, update.start(4), 39)
    assert (searching.adaptor_learning_rate, searching.max_step_norm) == pytest.approx((0.6, 1.0))
    assert searching.label_prior
    settled = [update.settle(args, memory, round) for round in (40, 70, 99)]
    rates = [each.adaptor_learning_rate or 0.0 for each in settled]
    assert rates == pytest.approx([0.6, 0.1 * 6**0.5, 0.1 * 6 ** (1 / 60)])
    # No longer than 1, times the rate; and longer gradients as the rate falls.
    assert [each.step_norms[1] for each in settled] == pytest.approx([1 / r for r in rates])
    assert [each.step_norms[0] for each in settled] == pytest.approx([3 / r for r in rates])
    assert not any(each.label_prior for each in settled)


@pytest.mark.parametrize("cohort", ["loop", "vectorized"])
@pytest.mark.parametrize(("said", "discounted"), [(None, 3), (True, 6), (False, 0)])
def test_what_trains_is_the_plain_loss_once_the_search_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cohort: str, said: bool | None, discounted: int
) -> None:
    seen: dict[bool, set[tuple[int, bool]]] = {True: set(), False: set()}
    call, parts = Forward.__call__, Forward.losses_of_parts

    def training(self: Forward, batch: Batch) -> Prediction:
        seen[torch.is_grad_enabled()].add((made._round, LABEL_PRIOR in batch))
        return call(self, batch)

    def looking(self: Forward, batches: Sequence[Batch]) -> torch.Tensor:
        seen[False].update((made._round, LABEL_PRIOR in batch) for batch in batches)
        return parts(self, batches)

    settings = SETTINGS | {"cohort": cohort, "label_prior": said}
    made = trainer(tmp_path, model=floral_net(r=1, num_adaptors=3), **settings)
    monkeypatch.setattr(Forward, "__call__", training)
    monkeypatch.setattr(Forward, "losses_of_parts", looking)
    made.train()
    assert seen[True] == {(round, round < discounted) for round in range(6)}
    assert {prior for _, prior in seen[False]} == {False, said is not False}  # what is looked at; the probe has none


def test_what_the_user_has_set_stays_as_it_is(tmp_path: Path) -> None:
    said: dict[str, Any] = {"label_prior": True, "adaptor_learning_rate": 0.02, "max_step_norm": 0.5}
    assert FederatedArguments(output_dir=str(tmp_path), max_step_norm=0.5).step_norms == (0.5, 0.5)
    args = FederatedArguments(output_dir=str(tmp_path), rounds=100, **said)
    update = get_router_update(args)
    settled = update.settle(args, update.settled(update.start(4), 40), 70)
    assert {name: getattr(settled, name) for name in said} == said


def test_a_long_run_compresses_at_the_thirtieth_participation() -> None:
    assert schedule.searched_rounds(pace=0.1, rounds=1500) == (300, 750)
    assert schedule.searched_rounds(pace=1.0, rounds=60) == (30, 30)
    assert schedule.searched_rounds(pace=0.1, rounds=100) == (50, 50)


@pytest.mark.parametrize("until", [2, 3, 4])
def test_a_run_goes_on_from_a_checkpoint_before_or_after_the_compression(tmp_path: Path, until: int) -> None:
    adam: dict[str, Any] = {"server_optimizer": "adam", "server_learning_rate": 0.01, "save_steps": 1}
    whole = run(tmp_path / "whole", **adam)
    first = trainer(tmp_path / "parts", model=floral_net(r=1, num_adaptors=3), **(SETTINGS | adam))
    first.callback_handler.add_callback(StopAfter(until))
    first.train()
    resumed = run(tmp_path / "parts", resume=True, **adam)
    held = tensors(resumed.model)
    for name, value in tensors(whole.model).items():
        assert torch.equal(value, held[name]), name


def test_the_best_model_is_one_that_the_user_asked_for(tmp_path: Path) -> None:
    made = run(tmp_path, eval_steps=1, load_best_model_at_end=True, learning_rate=0.0)
    assert made.state.best_global_step == 3
    assert_asked_for(made)
    made.publish(tmp_path / "published")
    assert json.loads((tmp_path / "published/adapter_config.json").read_text())["num_adaptors"] == 3


def assert_asked_for(made: Any, num_adaptors: int = 3) -> None:
    config = made.model.active_peft_config
    assert (config.num_adaptors, config.r) == (num_adaptors, 1)
    assert ranks(made.model) == {1} and made.mixtures()[1].shape == (4, num_adaptors)


def test_at_the_end_of_the_search_no_more_adaptors_are_left_than_may_stay(tmp_path: Path) -> None:
    made = run(tmp_path)
    assert [len(record["adaptors"]) for record in made.records] == [5, 5, 5, 3, 3, 3]
    gone = made.records[2]["pruned"]
    assert [drop["why"] for drop in gone] == ["bound", "bound"]
    assert {drop["adaptor"] for drop in gone} | set(made.records[3]["adaptors"]) == set(range(5))
    assert_asked_for(made)


def test_more_adaptors_leave_every_clients_model_what_it_was() -> None:
    model = floral_net(num_adaptors=2, init_std=0.5, num_clients=3, router_top_k=None)
    model.set_routers(torch.randn(3, 1, 2))
    points = torch.randn(5, 4)
    before = [model(points, client_ids=torch.full((5,), k)) for k in range(3)]
    model.base_model.make_room(6)
    for k in range(3):
        assert torch.allclose(model(points, client_ids=torch.full((5,), k)), before[k], atol=1e-6)
    assert model.active_peft_config.num_adaptors == 6


def test_routers_that_clients_bring_along_are_kept_by_the_copies(tmp_path: Path) -> None:
    model = floral_net(
        r=1, num_adaptors=2, init_std=0.5, num_clients=4, client_names=[f"client {k}" for k in range(4)]
    )
    routers = torch.randn(4, 1, 2)
    model.set_routers(routers, [f"client {k}" for k in range(4)])
    made = trainer(tmp_path, model=model, **(SETTINGS | {"search_adaptors": 4, "rounds": 1}))
    made._first_state(None)
    with made._visit():
        assert (
            made._clients.private("client 2")[made._routers.name].flatten().tolist()
            == routers[2].flatten().tolist() * 2
        )


@pytest.mark.parametrize(
    ("settings", "num_adaptors", "found", "searching"),
    [
        ({}, 4, {3, 4}, True),  # four times two, but not more than there are clients; layers of rank 4 and 3
        ({"search_adaptors": 7}, 7, {3, 4}, True),
        ({"search_adaptors": 1}, 2, {3, 4}, True),
        ({"search_r": 2}, 4, {2}, True),
        ({"search_r": 1}, 4, {1}, True),
        ({"search_adaptors": 2, "search_r": 1}, 2, {1}, False),
        ({"router_update": "gradient"}, 2, {1}, False),
        ({"optimal_routing": True}, 2, {1}, False),
    ],
)
def test_how_wide_a_search_is(
    tmp_path: Path, settings: dict[str, Any], num_adaptors: int, found: set[int], searching: bool
) -> None:
    made = trainer(tmp_path, model=floral_net(r=1), **({"router_update": "posterior"} | settings))
    state = made._first_state(None)
    assert len(state.adaptors) == made.model.active_peft_config.num_adaptors == num_adaptors
    assert ranks(made.model) == found and state.wide is searching


def test_adaptors_that_have_the_rank_of_their_layers_are_wide_enough(tmp_path: Path) -> None:
    model = floral_net(r=3, rank_pattern={"0": 4})
    made = trainer(tmp_path, model=model, router_update="posterior", search_adaptors=2)
    assert not made._first_state(None).wide


def test_one_adaptor_has_nothing_to_be_found(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=floral_net(r=1, num_adaptors=1), router_update="posterior")
    made.train()
    assert ranks(made.model) == {1} and made.model.active_peft_config.num_adaptors == 1


def test_a_training_that_is_stopped_in_the_search_ends_it_but_its_checkpoint_goes_on(tmp_path: Path) -> None:
    parts: dict[str, Any] = SETTINGS | {"save_steps": 1}
    made = trainer(tmp_path, model=floral_net(r=1, num_adaptors=3), **parts)
    made.callback_handler.add_callback(StopAfter(2))
    made.train()
    assert_asked_for(made)
    made.evaluate()
    resumed = run(tmp_path, resume=True, **parts)
    assert [len(record["adaptors"]) for record in resumed.records if record["event"] == "round"] == [5, 5, 5, 3, 3, 3]
    assert_asked_for(resumed)


def test_a_trainer_searches_again_from_what_it_has_found(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.args.overwrite_output_dir = True
    made.train()
    assert_asked_for(made)


def test_clients_side_by_side_find_the_same(tmp_path: Path) -> None:
    loop, vectorized = (run(tmp_path / cohort, cohort=cohort, rounds=4) for cohort in ("loop", "vectorized"))
    held = tensors(vectorized.model)
    for name, value in tensors(loop.model).items():
        assert torch.allclose(value, held[name], rtol=1e-3, atol=1e-3), name
