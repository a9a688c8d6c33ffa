"""Adaptors that nobody needs: which they are, and that they are gone for good."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from floral_peft.federated.routing import Drop, Posterior, prune, register_router_update, regrets, schedule
from floral_peft.federated.routing.numbering import numbered, renumbered
from floral_peft.federated.routing.prune import cut, lost_with

from .clients import StopAfter, floral_net, tensors, trainer


@register_router_update
class PrunesEarly(Posterior):
    """Removes adaptors 1, then 0, after the rounds 2 and 3: of 4, the numbers 0, 2, 3 and then 2, 3 are left."""

    name = "prunes early"

    def prune(self, memory: Mapping[str, Tensor], round: int) -> list[Drop]:
        return {2: [Drop(1, "dead", 0.0)], 3: [Drop(0, "dispensable", 0.2, 2, 0.1)]}.get(round, [])


SETTINGS: dict[str, Any] = {"router_update": "prunes early", "rounds": 5, "clients_per_round": 2, "search_r": 1}


def started(**config: Any) -> Any:
    return floral_net(num_adaptors=4, init_std=0.5, **config)


def run(folder: Path, model: Any = None, resume: bool | str = False, **settings: Any) -> Any:
    made = trainer(folder, model=model or started(), **(SETTINGS | settings))
    made.train(resume_from_checkpoint=resume)
    return made


def assert_equal(one: Any, other: Any) -> None:
    held = tensors(other.model)
    for name, value in tensors(one.model).items():
        assert torch.equal(value, held[name]), name


# Which adaptors go

USAGE = torch.tensor([40.0, 30.0, 30.0, 0.1, 20.0], dtype=torch.float64)


def losses_of(means: list[list[float]]) -> Tensor:
    return torch.tensor(means, dtype=torch.float64) * USAGE[: len(means), None]


#: 0, 1 and 4 are of clusters of their own, 2 is a duplicate of 1; 3 has no users.
MEANS: list[list[float]] = [[1, 9, 9, 5, 9], [9, 1, 1.2, 5, 9], [9, 1.1, 1, 5, 9], [5, 5, 5, 5, 5], [9, 9, 9, 5, 1]]


def test_regrets_are_what_users_lose_in_units_of_what_adaptors_matter() -> None:
    usage, losses = torch.tensor([2.0, 1.0]), torch.tensor([[2.0, 6.0], [4.0, 1.0]])
    # means [[1, 3], [4, 1]]: users of 0 lose 2 with 1, those of 1 lose 3 with 0; on average 7/3
    assert torch.allclose(regrets(usage, losses), torch.tensor([[0.0, 6 / 7], [9 / 7, 0.0]]))


def test_the_dead_and_the_less_used_of_duplicates_go() -> None:
    drops = prune(USAGE + torch.tensor([0, 5.0, 0, 0, 0]), losses_of(MEANS) + torch.tensor([0, 5.0, 0, 0, 0])[:, None])
    assert [(drop.adaptor, drop.why) for drop in drops] == [(3, "dead"), (2, "dispensable")]
    assert drops[1].instead == 1 and drops[1].regret is not None and drops[1].regret < 0.05


def test_a_small_cluster_with_an_adaptor_of_its_own_stays() -> None:
    usage = torch.tensor([60.0, 25.0, 10.0, 5.0], dtype=torch.float64)
    means = torch.full((4, 4), 3.0, dtype=torch.float64).fill_diagonal_(1.0)
    assert prune(usage, means * usage[:, None]) == []


def test_one_stays_whatever_happens_and_at_most_a_quarter_goes_as_dispensable() -> None:
    usage = torch.ones(8, dtype=torch.float64)
    assert len(prune(usage, torch.ones(8, 8, dtype=torch.float64))) == 2
    alone = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert [drop.adaptor for drop in prune(alone, torch.ones(4, 4, dtype=torch.float64))] == [1, 2, 3]
    assert prune(torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)) == []


def test_at_the_end_those_stay_with_which_the_users_of_all_lose_least() -> None:
    # 0 and 1 are of one cluster, 2 of another; 3 is half good for both. Whose own users lose least is 2, with 3, and
    # then 3 itself, with 0: so the second cluster would be left with nothing.
    usage = torch.tensor([3.0, 2.0, 4.0, 1.0], dtype=torch.float64)
    gaps = [[0, 0.16, 0.9, 0.5], [0.17, 0, 0.9, 0.5], [0.8, 0.8, 0, 0.12], [0.15, 0.2, 0.3, 0]]
    losses = (1 + torch.tensor(gaps, dtype=torch.float64)) * usage[:, None]
    drops = cut(usage, losses, 2)
    assert [(drop.adaptor, drop.why, drop.instead) for drop in drops] == [(3, "bound", 0), (1, "bound", 0)]
    assert [drop.share for drop in drops] == pytest.approx([0.1, 0.2])
    assert all(drop.regret == pytest.approx(float(regrets(usage, losses)[drop.adaptor, 0])) for drop in drops)
    assert [drop.adaptor for drop in cut(usage, losses, 1)] == [3, 1, 2]
    assert cut(usage, losses, 4) == []
    backwards = cut(usage.flip(0), losses.flip(0, 1), 2)
    assert [(drop.adaptor, drop.instead) for drop in backwards] == [(0, 3), (2, 3)]
    alike = torch.ones(3, 3, dtype=torch.float64)
    assert [drop.adaptor for drop in cut(torch.tensor([2.0, 1.0, 3.0]), alike * usage[:3, None], 1)] == [1, 0]
    assert len(cut(torch.zeros(4), torch.zeros(4, 4), 2)) == 2  # nobody has come yet


def test_what_is_lost_is_by_the_best_of_what_stays_and_by_how_many_use_what() -> None:
    usage = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    gaps = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, 1.0], [-0.5, 1.0, 0.0]], dtype=torch.float64)
    losses = (4 + gaps) * usage[:, None]  # on average users would lose (6·2 + 3·1 + 1·1)/10 = 1.6 with their worst
    assert lost_with(usage, losses, [0, 1, 2]) == pytest.approx((0 + 0 - 0.5) / 10 / 1.6)
    assert lost_with(usage, losses, [1, 2]) == pytest.approx((6 * 1 + 0 + 0) / 10 / 1.6)
    assert lost_with(usage, losses, [0]) == pytest.approx((0 + 3 * 0.5 - 0.5) / 10 / 1.6)
    assert lost_with(torch.zeros(3), torch.zeros(3, 3), [1]) == 0.0


@pytest.mark.parametrize(("pace", "first", "second"), [(0.1, 150, 162), (1.0, 15, 17)])
def test_adaptors_are_looked_at_by_participations(pace: float, first: int, second: int) -> None:
    due = [round for round in range(1, 1000) if schedule.pruning_due(round, pace)]
    assert due[:2] == [first, second]


def test_a_run_of_few_participations_goes_through_the_same_stages_sooner() -> None:
    assert schedule.pace(sampled=0.1, rounds=1500) == 0.1  # 150 participations: by participations
    assert schedule.pace(sampled=0.1, rounds=300) == 0.2  # 30: by shares of the run
    assert schedule.pace(sampled=0.1, rounds=20) == 1.0  # a round counts for no more than one
    assert schedule.pace(sampled=1.0, rounds=60) == 1.0


@pytest.mark.parametrize(
    ("switches", "round", "gone"), [(0.0, 15, [3, 2]), (60.0, 15, []), (60.0, 30, [3]), (60.0, 150, [3, 2])]
)
def test_while_clients_still_change_their_adaptors_only_the_dead_go_and_these_not_soon(
    tmp_path: Path, switches: float, round: int, gone: list[int]
) -> None:
    args = trainer(tmp_path, model=started(), router_update="posterior", rounds=300).args
    memory = {"usage": USAGE, "losses": losses_of(MEANS), "squares": torch.zeros(5, 5)}
    memory |= {"switches": torch.tensor([switches]), "visits": USAGE.sum().view(1)}
    assert [drop.adaptor for drop in Posterior(args).prune(memory, round)] == gone


# They are gone


def test_tensors_shrink_in_the_model_the_checkpoint_and_the_private_state(tmp_path: Path) -> None:
    made = run(tmp_path, save_steps=1, server_optimizer="adam", server_learning_rate=0.01)
    assert made.model.active_peft_config.num_adaptors == 2
    assert made.mixtures()[1].shape == (4, 2)
    for name, cluster in made._groups.clustered.items():
        shapes = {round: saved(tmp_path, round, "tensors")[name][cluster.axis] for round in range(1, 6)}
        assert shapes == {1: 4, 2: 3, 3: 2, 4: 2, 5: 2}
    for shape in saved(tmp_path, 5, "optimizer").values():
        assert 4 not in shape[:2] or shape in saved(tmp_path, 5, "tensors").values()
    routers = [made._store.get(k)[made._routers.name].shape[-1] for k in made._store.clients()]
    assert set(routers) <= {2, 3, 4} and 2 in routers
    assert {made._clients.private(k)[made._routers.name].shape[-1] for k in made.dataset} == {2}


def saved(folder: Path, round: int, what: str) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / f"checkpoint-{round}/server/{what}.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def test_a_round_says_which_adaptors_went_and_why_by_their_first_numbers(tmp_path: Path) -> None:
    records = [record for record in run(tmp_path).records if record["event"] == "round"]
    assert [record["adaptors"] for record in records] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3], [2, 3], [2, 3]]
    assert [len(record["usage"]) for record in records] == [4, 4, 3, 2, 2]
    assert records[1]["pruned"] == [{"adaptor": 1, "why": "dead", "share": 0.0, "instead": None, "regret": None}]
    assert records[2]["pruned"] == [{"adaptor": 0, "why": "dispensable", "share": 0.2, "instead": 3, "regret": 0.1}]
    assert records[3]["bytes_down"] < records[0]["bytes_down"]


@pytest.mark.parametrize("until", [1, 2, 3, 4])
def test_a_run_goes_on_from_a_checkpoint_before_or_after_a_pruning(tmp_path: Path, until: int) -> None:
    whole = run(tmp_path / "whole", server_optimizer="adam", server_learning_rate=0.01)
    parts: dict[str, Any] = {"server_optimizer": "adam", "server_learning_rate": 0.01, "save_steps": 1}
    first = trainer(tmp_path / "parts", model=started(), **(SETTINGS | parts))
    first.callback_handler.add_callback(StopAfter(until))
    first.train()
    assert_equal(whole, run(tmp_path / "parts", resume=True, **parts))


def test_one_trainer_goes_back_to_adaptors_that_it_has_lost(tmp_path: Path) -> None:
    made = run(tmp_path, save_steps=1)
    before = tensors(made.model)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(value, before[name]) for name, value in tensors(made.model).items())


def test_the_best_model_may_be_one_with_more_adaptors(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 0.0,
    }  # the first is never beaten
    made = run(tmp_path, **settings)
    assert made.state.best_global_step == 1
    assert made.model.active_peft_config.num_adaptors == 4
    assert made.mixtures()[1].shape == (4, 4)
    assert made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric)


def test_clients_side_by_side_lose_the_same_adaptors(tmp_path: Path) -> None:
    loop, vectorized = (run(tmp_path / cohort, cohort=cohort) for cohort in ("loop", "vectorized"))
    held = tensors(vectorized.model)
    for name, value in tensors(loop.model).items():
        assert torch.allclose(value, held[name], atol=1e-4), name


def test_statistics_of_adapted_batch_norms_shrink_too(tmp_path: Path) -> None:
    from .clients import net

    made = run(tmp_path, model=started(base=net(norm=True), adapt_norms="reparametrized"))
    name = next(name for name in made._groups.private if "floral_mean" in name)
    assert made._clients.private("client 0")[name].shape[0] == 2


def test_a_top_k_is_what_it_was_wherever_there_are_enough_adaptors(tmp_path: Path) -> None:
    made = run(tmp_path, model=started(router_top_k=3), save_steps=1, rounds=4)
    assert made.model.active_peft_config.router_top_k == 2
    assert made.model.router.settings["default"].top_k == 2
    made.args.rounds = 1
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert made.model.active_peft_config.router_top_k == made.model.router.settings["default"].top_k == 3


def test_a_published_model_has_the_adaptors_that_are_left(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    made.publish(tmp_path / "published")
    assert json.loads((tmp_path / "published/adapter_config.json").read_text())["num_adaptors"] == 2


def test_nothing_is_removed_unasked(tmp_path: Path) -> None:
    args = trainer(tmp_path, model=started(), router_update="posterior", prune_adaptors=False).args
    usage = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    pairs = {"losses": torch.ones(4, 4, dtype=torch.float64), "squares": torch.zeros(4, 4, dtype=torch.float64)}
    memory = {"usage": usage, "switches": torch.zeros(1), "visits": usage.sum().view(1), **pairs}
    assert Posterior(args).prune(memory, 15) == []
    assert len(Posterior(replace(args, prune_adaptors=True)).prune(memory, 15)) == 3


def test_one_user_proves_nothing(tmp_path: Path) -> None:
    """Two adaptors that are nearly the same for their users: dispensable if many say so, not if it is one."""
    args = trainer(tmp_path, model=started(), router_update="posterior", rounds=100).args
    means = torch.tensor([[0, 2, 2, 2], [2, 0, 2, 2], [2, 2, 0, 0.1], [2, 2, 0.1, 0]], dtype=torch.float64)
    gone = []
    for users in (1.0, 30.0):  # each of the adaptors has; of late every client came 1/(1 − δ) times
        usage = torch.full((4,), users / (1 - schedule.server_decay(1.0)), dtype=torch.float64)
        memory = {
            "usage": usage,
            "losses": means * users / (1 - schedule.server_decay(1.0)),
            "switches": torch.zeros(1),
            "visits": usage.sum().view(1),
        }
        memory["squares"] = (means**2 + 0.09) * usage[:, None]  # clients differ by 0.3
        gone.append([drop.adaptor for drop in Posterior(args).prune(memory, 15)])
    assert gone == [[], [2]]


def test_clients_that_look_at_half_of_their_visits_prove_as_much(tmp_path: Path) -> None:
    update = Posterior(trainer(tmp_path, model=started(), router_update="posterior", rounds=100).args)
    squares, usage = torch.full((3, 3), 8.0), torch.full((3,), 20.0)
    always = update._errors({"usage": usage, "squares": squares, "visits": torch.tensor([60.0])})
    half = update._errors({"usage": usage / 2, "squares": squares / 2, "visits": torch.tensor([60.0])})
    assert torch.allclose(always, half)


def test_a_change_from_an_adaptor_to_its_duplicate_is_none(tmp_path: Path) -> None:
    args = trainer(tmp_path, model=started(), router_update="posterior", rounds=100).args
    means = torch.tensor([[0, 2, 2], [2, 0, 0.1], [2, 0.1, 0]], dtype=torch.float64)
    memory = {"usage": torch.full((3,), 90.0), "losses": 90 * means, "squares": torch.zeros(3, 3)}
    memory["visits"] = torch.tensor([270.0])
    alike = [[Posterior(args)._alike(one, other, memory) for other in range(3)] for one in range(3)]
    assert alike == [[True, False, False], [False, True, True], [False, True, True]]
    memory["squares"] += 90 * 90.0  # too uncertain to tell
    assert not Posterior(args)._alike(1, 2, memory)


@pytest.mark.parametrize(
    ("switches", "round", "gone"),
    [(0.0, 15, ["dead", "dispensable"]), (9.0, 15, []), (9.0, 51, ["dead", "dispensable"])],
)
def test_while_the_search_goes_on_and_clients_change_adaptors_none_is_removed(
    tmp_path: Path, switches: float, round: int, gone: list[str]
) -> None:
    args = trainer(tmp_path, model=started(), router_update="posterior", rounds=100).args
    memory = {"usage": USAGE[:4], "losses": losses_of([row[:4] for row in MEANS[:4]])}
    visits = memory["usage"].sum().view(1)
    memory |= {"switches": switches / 50 * visits, "visits": visits, "squares": torch.zeros(4, 4)}
    assert [drop.why for drop in Posterior(args).prune(memory, round)] == gone


@pytest.mark.parametrize(("round", "gone"), [(45, []), (51, ["dead", "dispensable"])])
def test_soon_after_a_compression_none_is_removed(tmp_path: Path, round: int, gone: list[str]) -> None:
    args = trainer(tmp_path, model=started(), router_update="posterior", rounds=100).args
    memory = {"usage": USAGE[:4], "losses": losses_of([row[:4] for row in MEANS[:4]])}
    memory |= {"switches": torch.zeros(1), "squares": torch.zeros(4, 4), "searched": torch.tensor([40.0])}
    memory["visits"] = memory["usage"].sum().view(1)
    assert [drop.why for drop in Posterior(args).prune(memory, round)] == gone


@pytest.mark.parametrize(
    ("pace", "rounds", "recovered"),
    [(1.0, 300, 10), (0.2, 300, 50), (0.1, 1500, 100), (1.0, 60, 10), (1.0, 20, 10 / 3)],
)
def test_in_a_short_run_duplicates_go_sooner_after_the_compression(pace: float, rounds: int, recovered: float) -> None:
    assert schedule.recovered_rounds(pace, rounds) == pytest.approx(recovered)


def test_private_tensors_of_any_time_are_read_over_the_adaptors_of_now() -> None:
    logits = torch.arange(5.0).view(1, 1, 5)
    like = {"router": torch.zeros(1, 1, 2), "mean": torch.zeros(3)}
    whole = numbered({"router": logits, "mean": torch.ones(3)}, range(5), 5)
    later = numbered({"router": logits[..., [0, 2, 4]], "mean": torch.ones(3)}, (0, 2, 4), 5)
    for stored in (whole, later):
        found = renumbered(stored, (2, 4), like)
        assert found["router"].flatten().tolist() == [2.0, 4.0]
        assert found.keys() == like.keys()
