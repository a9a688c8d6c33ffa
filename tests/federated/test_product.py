"""Adaptors averaged as matrices: the mean of the products, in any order, and what is cut off is told."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from floral_peft.federated import FederatedArguments
from floral_peft.federated.aggregation import Aggregate, ClientUpdate
from floral_peft.federated.groups import Clustered, ParameterGroups
from floral_peft.federated.product import ProductMean
from floral_peft.tuner import Role

from .clients import floral_net, tensors, trainer
from .test_processes import assert_same, launch, result


C, R = 3, 2
SHAPES = {"u": (5,), "A": (C, R, 6), "B": (5, C, R), "kA": (C, R, 3, 1, 3), "kB": (4, C, R, 3, 1), "sA": (1, R, 6)}
SHAPES |= {"sB": (5, 1, R)}
ROLES = {
    "u": Role("base"),
    "A": Role("adaptor", 0, 0, "A", "one"),
    "B": Role("adaptor", 1, 0, "B", "one"),
    "kA": Role("adaptor", 0, 1, "A", "two"),
    "kB": Role("adaptor", 1, 1, "B", "two"),
    "sA": Role("shared_adaptor", None, 0, "A", "one"),
    "sB": Role("shared_adaptor", None, 0, "B", "one"),
}
GROUPS = ParameterGroups(
    shared=("u", "sA", "sB"),
    statistics=(),
    clustered={n: Clustered(r.axis, r.slot) for n, r in ROLES.items() if r.axis is not None},
    private=(),
    roles=ROLES,
)


def drawn(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


OLD = drawn(0)


def update(client: int, scale: float = 0.3) -> ClientUpdate:
    generator = torch.Generator().manual_seed(client)
    mixtures = torch.rand(2, C, generator=generator, dtype=torch.float64)
    mixtures[:, 2] = 0.0  # nobody uses the last adaptor
    usage = mixtures / mixtures.sum(dim=1, keepdim=True) * (client + 1)
    return ClientUpdate(client, 1, client + 1, usage, drawn(10 + client, scale), 0.0)


def mean(updates: list[ClientUpdate], cohort: int = 4) -> Aggregate:
    running = ProductMean(OLD, GROUPS, list(range(cohort)), torch.Size([2, C]))
    for one in updates:
        running.add(one)
    return running.result()


def matrices(tensors: dict[str, Tensor], pair: str) -> Tensor:
    a, b = tensors[f"{pair}A"].double(), tensors[f"{pair}B"].double()
    return torch.einsum("crn,mcr->cmn", a.flatten(2), b.movedim(0, 2).flatten(2).permute(2, 0, 1))


def moved(aggregate: Aggregate) -> dict[str, Tensor]:
    return {name: OLD[name] + delta for name, delta in aggregate.deltas.items()}


@pytest.mark.parametrize(("pair", "slot"), [("", 0), ("k", 1), ("s", None)])
def test_it_is_the_best_approximation_of_the_mean_product(pair: str, slot: int | None) -> None:
    updates = [update(client) for client in range(4)]
    aggregate = mean(updates)
    new = matrices(moved(aggregate), pair)
    for c in range(len(new)):
        if c == 2:
            torch.testing.assert_close(new[c], matrices(OLD, pair)[c])
            continue
        weights = [float(one.num_examples if slot is None else one.usage[slot, c]) for one in updates]  # type: ignore[index]
        each = [matrices({name: OLD[name] + one.deltas[name] for name in OLD}, pair)[c] for one in updates]
        whole = torch.stack(each).mul(torch.tensor(weights).double().view(-1, 1, 1)).sum(dim=0) / sum(weights)
        sigma, kept = torch.linalg.svdvals(whole), torch.linalg.svdvals(new[c])
        torch.testing.assert_close(kept[:R], sigma[:R], rtol=1e-6, atol=1e-6)
        lost = float((whole - new[c]).norm())
        assert lost == pytest.approx(float(sigma[R:].norm()), rel=1e-5)
        assert aggregate.truncation is not None and lost / float(whole.norm()) <= aggregate.truncation * (1 + 1e-6)


def test_everything_else_is_averaged_as_ever() -> None:
    updates = [update(client) for client in range(4)]
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]) / 10
    expected = sum(w * one.deltas["u"] for w, one in zip(weights, updates, strict=True))
    torch.testing.assert_close(mean(updates).deltas["u"].float(), expected)


def test_one_client_alone_is_taken_as_it_is() -> None:
    one = update(2)
    aggregate = mean([one])
    expected = {name: OLD[name] + one.deltas[name] for name in OLD}
    for pair in ("", "k", "s"):
        got, wanted = matrices(moved(aggregate), pair)[:2], matrices(expected, pair)[:2]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # stored in float32
    assert aggregate.truncation is not None and aggregate.truncation < 1e-7


def test_the_order_of_the_clients_changes_no_bit() -> None:
    updates = [update(client) for client in range(3)]
    told = []
    for order in itertools.permutations(updates):
        running = ProductMean(OLD, GROUPS, list(range(4)), torch.Size([2, C]))
        for one in order:
            running.add(one)
        running.reduce(running._processes)
        told.append(running.result())
    for other in told[1:]:
        assert all(torch.equal(other.deltas[name], told[0].deltas[name]) for name in OLD)


@pytest.mark.parametrize("larger", ["A", "B"])
def test_directions_that_an_adaptor_does_not_use_stay_open(larger: str) -> None:
    """Where the mean is zero, as at the start, or of rank one, the factor that is not zero stays as it was."""
    zero = "B" if larger == "A" else "A"
    old = OLD | {zero: torch.zeros(SHAPES[zero])}
    for rank in range(2):
        running = ProductMean(old, GROUPS, [0], torch.Size([2, C]))
        step = update(0)
        deltas = {name: torch.zeros_like(value) for name, value in step.deltas.items()}
        deltas[zero].movedim(1 if zero == "A" else 2, 0)[:rank] = 0.1  # of the first rank-one terms
        running.add(ClientUpdate(0, 1, 1, step.usage, deltas, 0.0))
        aggregate = running.result()
        new = {name: old[name] + aggregate.deltas[name].float() for name in old}
        expected = {name: old[name] + deltas[name] for name in old}
        torch.testing.assert_close(matrices(new, "")[:2], matrices(expected, "")[:2], rtol=1e-5, atol=1e-6)
        axis = 1 if larger == "A" else 2
        assert torch.equal(new[larger].movedim(axis, 0)[rank:], old[larger].movedim(axis, 0)[rank:])


def test_a_round_reports_what_was_cut_off(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=floral_net(), adaptor_aggregation="product", local_epochs=3)
    run.train()
    assert all(0 < record["truncation"] < 1 for record in run.records)
    other = trainer(tmp_path / "factors", model=floral_net(), local_epochs=3)
    other.train()
    assert all(record["truncation"] is None for record in other.records)
    one, two = tensors(run.model), tensors(other.model)
    assert any(not torch.equal(one[name], two[name]) for name in one if "floral" in name)


def test_several_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "adaptor_aggregation": "product",
        "server_optimizer": "sgd",
        "server_learning_rate": 1.0,
        "rounds": 2,
    }
    assert launch(1, tmp_path / "alone", **options) == [0]
    assert launch(2, tmp_path / "run", **options) == [0, 0]
    for rank in range(2):
        assert_same(result(tmp_path / "run", rank, 2), result(tmp_path / "alone", 0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptor_aggregation": "matrix"}, "must be one of factors, product"),
        ({"adaptor_aggregation": "product", "server_optimizer": "adam"}, "needs the server's plain average"),
        ({"adaptor_aggregation": "product", "server_learning_rate": 0.5}, "needs the server's plain average"),
        ({"adaptor_aggregation": "product", "server_optimizer_kwargs": {"momentum": 0.9}}, "plain average"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedArguments(**settings)
