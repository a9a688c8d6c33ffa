"""A round as a function, and the server's optimisers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from floral_peft.federated.aggregation import ClientUpdate
from floral_peft.federated.groups import Clustered, ParameterGroups
from floral_peft.federated.rounds import RoundReport, TooFewClientsError, run_round
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.server import ServerSettings, ServerState


GROUPS = ParameterGroups(
    shared=("u",), statistics=("variance",), clustered={"a": Clustered(axis=0)}, private=(), roles={}
)
STATE = ServerState(
    round=4, tensors={"u": torch.tensor([1.0]), "variance": torch.tensor([4.0]), "a": torch.tensor([1.0, 2.0])}
)


def settings(optimizer: Any = torch.optim.SGD, lr: float = 1.0, **more: Any) -> ServerSettings:
    return ServerSettings(GROUPS, torch.Size([1, 2]), lambda tensors: optimizer(tensors, lr=lr, **more), min_clients=1)


def send(client_id: ClientId, examples: int = 2, step: float = 0.5, mixture: tuple[float, float] = (0.5, 0.5)) -> Any:
    usage = torch.tensor([mixture], dtype=torch.float64) * examples
    deltas = {name: torch.full_like(value, step) for name, value in STATE.tensors.items()}
    return ClientUpdate(client_id, STATE.round + 1, examples, usage, deltas, train_loss=step), {}


class Clients:
    """Clients that answer with what they are told to, and a store that remembers what it is given."""

    def __init__(self, answers: dict[ClientId, Any]) -> None:
        self.answers = answers
        self.kept: list[tuple[ClientId, int]] = []

    def run(self, settings: ServerSettings, state: ServerState = STATE) -> tuple[ServerState, RoundReport]:
        return run_round(state, list(self.answers), self.train, self.keep, settings)

    def train(self, cohort: Sequence[ClientId], state: ServerState) -> Iterator[tuple[ClientId, Any]]:
        for client_id in cohort:
            answer = self.answers[client_id]
            if isinstance(answer, KeyboardInterrupt):
                raise answer
            yield client_id, answer

    def keep(self, client_id: ClientId, round: int, private: dict[str, Tensor]) -> None:
        self.kept.append((client_id, round))


def test_sgd_with_rate_one_is_the_plain_average() -> None:
    clients = Clients({"a": send("a", 1, 0.5), "b": send("b", 3, -0.5)})
    state, report = clients.run(settings())
    assert state.round == 5
    assert {name: value.tolist() for name, value in state.tensors.items()} == {
        "u": [0.75],  # 1 + (1·0.5 − 3·0.5)/4
        "variance": [3.75],
        "a": [0.75, 1.75],
    }
    assert (report.round, report.clients_trained, report.train_loss) == (5, 2, -0.25)
    assert report.usage == [0.5, 0.5]
    assert report.router_entropy == pytest.approx(0.6931, abs=1e-4)


def test_the_old_state_is_not_changed() -> None:
    before = {name: value.clone() for name, value in STATE.tensors.items()}
    Clients({"a": send("a")}).run(settings(torch.optim.Adam))
    assert all(torch.equal(before[name], value) for name, value in STATE.tensors.items())
    assert STATE.optimizer == {}


def test_adam_takes_old_minus_new_as_its_gradient_and_keeps_its_moments() -> None:
    state, clients = STATE, Clients({"a": send("a")})
    reference = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.Adam([reference], lr=0.1)
    for round in (5, 6, 7):
        answer, private = send("a", step=0.5 / round)
        clients.answers["a"] = replace(answer, round=round), private
        state, _ = clients.run(settings(torch.optim.Adam, 0.1), state)
        reference.grad = torch.tensor([-0.5 / round])
        optimizer.step()
    assert torch.equal(state.tensors["u"], reference.detach())
    assert set(state.optimizer["u"]) == {"step", "exp_avg", "exp_avg_sq"}


def test_statistics_are_averaged_whatever_the_servers_optimiser() -> None:
    state, _ = Clients({"a": send("a", step=-3.5)}).run(settings(torch.optim.Adam, 10.0))
    assert state.tensors["variance"].tolist() == [0.5]
    assert "variance" not in state.optimizer


def test_momentum_does_not_move_an_adaptor_without_users() -> None:
    sgd = settings(torch.optim.SGD, 1.0, momentum=0.9)
    state, _ = Clients({"a": send("a")}).run(sgd)
    answer, private = send("a", mixture=(1.0, 0.0))
    after, _ = Clients({"a": (replace(answer, round=6), private)}).run(sgd, state)
    assert after.tensors["a"][1] == state.tensors["a"][1]
    assert after.tensors["a"][0] != state.tensors["a"][0]


BAD = send("bad")[0]
FAILURES: list[tuple[Any, str]] = [
    (ValueError("no such column"), "ValueError"),
    (torch.OutOfMemoryError("out of memory"), "OutOfMemoryError"),
    (
        (replace(BAD, deltas={**BAD.deltas, "u": torch.tensor([float("nan")])}), {}),
        "u holds values that are not finite",
    ),
    ((replace(BAD, deltas={**BAD.deltas, "u": torch.zeros(3)}), {}), "u has shape"),
    ((replace(BAD, round=1), {}), "for round 1, expected 5"),
    ((replace(BAD, train_loss=float("nan")), {}), "client 'bad': train_loss is nan"),
    (None, "TypeError"),
    ((replace(BAD, deltas=None), {}), "AttributeError"),
    ((replace(BAD, num_examples=10**400), {}), "OverflowError"),
    ((replace(BAD, deltas={name: delta.to("meta") for name, delta in BAD.deltas.items()}), {}), "Error"),
    ((replace(BAD, deltas={name: delta.to_sparse() for name, delta in BAD.deltas.items()}), {}), "Error"),
]


@pytest.mark.parametrize(("answer", "reason"), FAILURES)
def test_a_bad_client_costs_its_own_update_only(answer: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with_bad = Clients({"a": send("a"), "bad": answer, "b": send("b", 6, 0.25)})
    state, report = with_bad.run(settings())
    expected, _ = Clients({"a": send("a"), "b": send("b", 6, 0.25)}).run(settings())
    assert all(torch.equal(state.tensors[name], expected.tensors[name]) for name in state.tensors)
    assert list(report.clients_dropped) == ["bad"]
    assert reason in report.clients_dropped["bad"]
    assert "no such column" not in report.clients_dropped["bad"]
    assert report.clients_trained == 2
    assert with_bad.kept == [("a", 5), ("b", 5)]
    assert "update dropped" in caplog.text


def test_a_client_that_is_in_the_cohort_twice_is_counted_once() -> None:
    train, keep = (clients := Clients({"a": send("a"), "b": send("b")})).train, clients.keep
    once, _ = run_round(STATE, ["a", "b"], train, keep, settings())
    twice, report = run_round(STATE, ["a", "b", "a"], train, keep, settings())
    assert all(torch.equal(once.tensors[name], twice.tensors[name]) for name in STATE.tensors)
    assert report.clients_trained == 2
    assert "counted already" in report.clients_dropped["a"]


def test_an_interrupt_is_not_a_bad_client() -> None:
    with pytest.raises(KeyboardInterrupt):
        Clients({"a": KeyboardInterrupt()}).run(settings())


def test_too_few_updates_are_an_error_that_says_why() -> None:
    clients = Clients({"a": send("a"), "b": ValueError("no labels")})
    with pytest.raises(TooFewClientsError, match=r"round 5: 1 clients.*min_clients=2.*'b': ValueError; the log"):
        clients.run(replace(settings(), min_clients=2))


def test_the_traceback_of_only_the_first_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Clients({"a": ValueError("x"), "b": ValueError("y"), "c": send("c")}).run(settings())
    assert ["\nValueError: x" in record.message for record in caplog.records] == [True, False]


def test_one_clients_mixture_is_not_reported() -> None:
    _, report = Clients({"a": send("a", mixture=(0.9, 0.1))}).run(settings())
    assert report.usage is None
    assert report.router_entropy is None


def test_updates_are_clipped_before_they_are_averaged() -> None:
    clients = Clients({"a": send("a", step=100.0)})
    state, report = clients.run(replace(settings(), max_update_norm=2.0))
    assert report.update_norm == pytest.approx(2.0)
    assert state.tensors["u"].item() == pytest.approx(2.0)  # four numbers of 1 have the norm 2


def test_a_method_that_shares_nothing_still_counts_its_rounds() -> None:
    groups = ParameterGroups(shared=(), statistics=(), clustered={}, private=("p",), roles={})
    state = ServerState(round=4, tensors={})
    clients = Clients({"a": (ClientUpdate("a", 5, 3, None, {}, 1.0), {"p": torch.zeros(1)})})
    new, report = clients.run(replace(settings(), groups=groups, routers=None), state)
    assert (new.round, report.update_norm, report.usage) == (5, 0.0, None)
