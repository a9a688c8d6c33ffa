"""Side by side a client that uses one member of an ensemble trains that one, and it comes out as if all had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from floral_peft.federated import ServerState
from floral_peft.federated.side_by_side import SideBySide
from floral_peft.federated.used_members import Members
from floral_peft.tuner import Ensemble, FloralConfig, reinitialized

from .clients import net, population, trainer


MEMBERS = 3
NEVER = -1e4
#: The members that client 0, 1, ... uses.
USED = ([0], [2], [0, 1], [2])


@pytest.fixture
def visits() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


def ensemble(**config: Any) -> Ensemble:
    torch.manual_seed(0)
    first = net(norm=True)
    return Ensemble([first, *(reinitialized(first) for _ in range(MEMBERS - 1))], FloralConfig(**config))


def trained(folder: Path, visits: ExitStack, config: dict[str, Any], **settings: Any) -> tuple[Any, list[list[int]]]:
    """A round of the clients side by side: what comes of it, and which members learned in each group."""
    method = settings.pop("method", "ensemble")
    data = population(num_clusters=MEMBERS)
    fixed = {"optimal_routing": method == "ensemble"}  # local steps leave the router alone
    made = trainer(folder, method, model=ensemble(**config), dataset=data, **fixed, **settings)
    visits.enter_context(made._visit())
    state = ServerState.of(made.model, made._groups)
    router = next(name for name, role in made._groups.roles.items() if role.kind == "router")
    logits = {f"client {k}": torch.full((1, 1, MEMBERS), NEVER) for k in range(len(USED))}
    for k, used in enumerate(USED):
        logits[f"client {k}"][..., used] = torch.linspace(0.0, 0.4, len(used))
    learned: list[list[int]] = []

    def note(number: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            if torch.is_grad_enabled():
                learned[-1].append(number)

        return hook

    for number, member in enumerate(made.model.members):
        member.register_forward_pre_hook(note(number))
    made.model.register_forward_pre_hook(lambda module, args: learned.append([]))

    def load(client_id: Any) -> Any:
        return made.dataset[client_id]["train"], {router: logits[client_id]}

    training = SideBySide(made._place)
    found = dict(zip(logits, training(list(logits), load, state), strict=True))
    assert training.failure is None
    return found, [members for members in learned if members]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {"local_epochs": 2}),
        ({"router_temperature": 2.0}, {"max_grad_norm": 0.5}),
        ({}, {"method": "ifca", "weight_decay": 0.1}),
    ],
    ids=["", "clipped", "ifca"],
)
def test_the_others_change_nothing(
    tmp_path: Path,
    visits: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    found, learned = trained(tmp_path / "part", visits, config, **settings)
    assert {tuple(members) for members in learned} == {(0,), (2,), (0, 1, 2)}  # the last of those who use several
    monkeypatch.setattr(Members, "among", lambda self, trainable: False)
    expected, all_learned = trained(tmp_path / "whole", visits, config, **settings)
    assert {tuple(members) for members in all_learned} == {(0, 1, 2)}
    for k, client_id in enumerate(expected):
        (update, private), (other, kept) = found[client_id], expected[client_id]
        assert update.train_loss == pytest.approx(other.train_loss, rel=1e-5)
        assert torch.equal(update.usage, other.usage)
        assert private.keys() == kept.keys() and all(torch.equal(private[name], kept[name]) for name in kept)
        assert update.deltas.keys() == other.deltas.keys()
        for name, delta in other.deltas.items():
            if int(name.split(".")[1]) in USED[k]:
                torch.testing.assert_close(update.deltas[name], delta, rtol=1e-4, atol=1e-5)
                assert delta.any() or "running" in name or name.endswith("0.bias")
            elif len(USED[k]) == 1:
                assert not update.deltas[name].any() and update.deltas[name].shape == delta.shape


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("ensemble", "local steps train the router"),
        ("fedem", "a forward of its own"),
    ],
)
def test_where_the_others_may_count_they_take_part(tmp_path: Path, visits: ExitStack, method: str, why: str) -> None:
    made = trainer(tmp_path, method, model=ensemble())
    visits.enter_context(made._visit())
    trains = [name for name, parameter in made.model.named_parameters() if parameter.requires_grad]
    assert not Members(made._place).among(trains)


def test_noise_may_give_them_weights(tmp_path: Path) -> None:
    for noise in (0.0, 0.1):
        made = trainer(tmp_path / str(noise), "ifca", model=ensemble(router_noise=noise))
        with made._visit():
            trains = [name for name, parameter in made.model.named_parameters() if parameter.requires_grad]
            assert Members(made._place).among(trains) is not bool(noise)


def test_groups_are_by_the_member_that_is_used_alone(tmp_path: Path) -> None:
    members = Members(trainer(tmp_path, "ensemble", model=ensemble())._place)
    mixtures = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    some = ["members.0.0.weight", "members.1.0.weight"]
    assert members.grouped(mixtures.unsqueeze(1), some) == [([1, 4], None), ([2], 0), ([0, 3], 1)]
    assert members.grouped(mixtures.unsqueeze(1), some[:1]) == [([0, 1, 3, 4], None), ([2], 0)]  # 1 is not trained
    assert members.others(None) == frozenset()
    owners = {name.split(".")[1] for name in members.others(1)}
    assert owners == {"0", "2"}


def test_a_frozen_member_stops_no_run_side_by_side(tmp_path: Path) -> None:
    model = ensemble()
    model.members[1].requires_grad_(False)
    frozen = {name: value.clone() for name, value in model.members[1].named_parameters()}
    made = trainer(
        tmp_path, "ensemble", model=model, dataset=population(num_clusters=MEMBERS), optimal_routing=True,
        cohort="vectorized", eval_steps=None,
    )  # fmt: skip
    made.train()
    rounds = [record for record in made.records if record["event"] == "round"]
    assert len(rounds) == 2 and not any(record["clients_dropped"] for record in rounds)
    assert all(torch.equal(value, frozen[name]) for name, value in made.model.members[1].named_parameters())


def test_after_a_failure_all_are_run_again() -> None:
    model = ensemble()
    inputs = torch.zeros(2, 4)
    with pytest.raises(KeyError), model.alone(1):
        raise KeyError
    seen: list[int] = []
    for number, member in enumerate(model.members):
        member.register_forward_pre_hook(lambda module, args, number=number: seen.append(number))
    result: Tensor = model(inputs)
    assert seen == [0, 1, 2] and result.isfinite().all()
