"""The weighted means of a round's updates, against numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from floral_peft.federated.aggregation import (
    ClientUpdate,
    UpdateError,
    WeightedMean,
    check_update,
    clip_update,
    keep_unused,
    mean_entropy,
    update_norm,
)
from floral_peft.federated.groups import Clustered, ParameterGroups


GROUPS = ParameterGroups(shared=("u",), statistics=(), clustered={"a": Clustered(axis=1)}, private=(), roles={})
SERVER = {"u": torch.tensor([10.0, 20.0]), "a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
ROUTERS = torch.Size([1, 2])


def update(who: str, examples: int, mixture: list[float], u: list[float], a: list[list[float]]) -> ClientUpdate:
    usage = torch.tensor([mixture], dtype=torch.float64) * examples
    return ClientUpdate(who, 1, examples, usage, {"u": torch.tensor(u), "a": torch.tensor(a)}, train_loss=0.0)


def mean(*updates: ClientUpdate) -> Any:
    sums = WeightedMean(SERVER, GROUPS, 4, ROUTERS)
    for one in updates:
        sums.add(one)
    return sums.result()


def test_shared_tensors_are_weighted_by_examples_and_adaptors_by_their_users() -> None:
    # N = 2, 6; π = (1/2, 1/2), (1/6, 5/6): the adaptors' weights π N are (1, 1) and (1, 5).
    first = update("a", 2, [1 / 2, 1 / 2], [4.0, 0.0], [[2.0, 6.0], [0.0, 12.0]])
    second = update("b", 6, [1 / 6, 5 / 6], [0.0, 8.0], [[4.0, 0.0], [8.0, 6.0]])
    result = mean(first, second)
    assert result.deltas["u"].tolist() == [1.0, 6.0]  # (2·4 + 6·0)/8, (2·0 + 6·8)/8
    # adaptor 0: (2 + 4)/2, (0 + 8)/2; adaptor 1: (6 + 0)/6, (12 + 30)/6
    assert result.deltas["a"].tolist() == [[3.0, 1.0], [4.0, 7.0]]
    assert result.usage.tolist() == [[0.25, 0.75]]


def test_the_order_of_clients_changes_nothing() -> None:
    torch.manual_seed(3)
    clients = []
    for k in range(4):
        share, scale = float(torch.rand(())), 10.0 ** (3 * k - 6)
        u, a = torch.randn(2) * scale, torch.randn(2, 2) / scale
        clients.append(update(str(k), 7 * k + 1, [share, 1 - share], u.tolist(), a.tolist()))
    expected = mean(*clients)
    for order in permutations(clients):
        found = mean(*order)
        assert all(torch.equal(found.deltas[name], expected.deltas[name]) for name in SERVER)
        assert torch.equal(found.usage, expected.usage)


def test_an_adaptor_without_users_has_no_update_and_no_nan() -> None:
    result = mean(update("a", 4, [1.0, 0.0], [1.0, 1.0], [[1.0, 5.0], [1.0, 5.0]]))
    assert result.deltas["a"].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert result.used().tolist() == [[True, False]]


def test_clients_of_different_adaptors_each_move_their_own() -> None:
    first = update("a", 2, [1.0, 0.0], [1.0, 1.0], [[1.0, 0.0], [2.0, 0.0]])
    second = update("b", 6, [0.0, 1.0], [1.0, 1.0], [[0.0, 3.0], [0.0, 4.0]])
    assert mean(first, second).deltas["a"].tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_a_next_to_unused_adaptor_is_unused() -> None:
    result = mean(update("a", 4, [1 - 1e-9, 1e-9], [1.0, 1.0], [[1.0, 5.0], [1.0, 5.0]]))
    assert result.deltas["a"][:, 1].tolist() == [0.0, 0.0]


def test_an_unused_adaptor_keeps_its_value_whatever_the_optimiser_did() -> None:
    moved = {name: value + 1 for name, value in SERVER.items()}
    kept = keep_unused(moved, SERVER, torch.tensor([[False, True]]), GROUPS)
    assert kept["a"].tolist() == [[1.0, 3.0], [3.0, 5.0]]
    assert kept["u"].tolist() == [11.0, 21.0]


def test_each_layer_is_weighed_by_its_own_router() -> None:
    groups = replace(GROUPS, clustered={"a": Clustered(axis=1, slot=1)})
    usage = [torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 6.0], [3.0, 3.0]])]
    sums = WeightedMean(SERVER, groups, 2, torch.Size([2, 2]))
    for examples, used, value in ((2, usage[0], 4.0), (6, usage[1], 8.0)):
        deltas = {"u": torch.zeros(2), "a": torch.full((2, 2), value)}
        sums.add(ClientUpdate("a", 1, examples, used.double(), deltas, 0.0))
    assert sums.result().deltas["a"].tolist() == [[7.0, 7.0], [7.0, 7.0]]  # (1·4 + 3·8)/4


def test_a_client_counts_where_the_router_of_the_layer_uses_an_adaptor() -> None:
    groups = replace(GROUPS, clustered={"a": Clustered(axis=1, slot=1)})
    sums = WeightedMean(SERVER, groups, 1, torch.Size([2, 2]))
    deltas = {"u": torch.zeros(2), "a": torch.ones(2, 2)}
    sums.add(ClientUpdate("a", 1, 4, torch.tensor([[4.0, 0.0], [0.0, 4.0]]).double(), deltas, 0.0))
    assert sums.result().deltas["a"].tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_many_small_updates_are_summed_without_loss() -> None:
    sums = WeightedMean({"u": torch.zeros(1)}, replace(GROUPS, clustered={}), 1000)
    for _ in range(1000):
        sums.add(ClientUpdate("a", 1, 1, None, {"u": torch.tensor([0.1])}, 0.0))
    assert sums.result().deltas["u"].item() == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_nothing_cannot_be_averaged() -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        WeightedMean(SERVER, GROUPS, 4, ROUTERS).result()


GOOD = update("hamlet", 4, [0.5, 0.5], [1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]])


def with_delta(name: str, value: Tensor) -> ClientUpdate:
    return replace(GOOD, deltas={**GOOD.deltas, name: value})


BAD: list[tuple[ClientUpdate, str]] = [
    (replace(GOOD, client_id="ophelia"), "the update is of client 'ophelia'"),
    (replace(GOOD, round=2), "for round 2, expected 1"),
    (replace(GOOD, num_examples=0), "num_examples is 0"),
    (replace(GOOD, num_examples=-3), "num_examples is -3"),
    (replace(GOOD, num_examples=float("nan")), "num_examples is nan"),  # type: ignore[arg-type]
    (replace(GOOD, deltas={"u": torch.zeros(2)}), r"missing tensors \['a'\]"),
    (with_delta("router", torch.zeros(2)), r"unexpected tensors \['router'\]"),
    (with_delta("u", torch.zeros(1)), r"u has shape \(1,\), expected \(2,\)"),
    (with_delta("a", torch.zeros(2)), r"a has shape \(2,\), expected \(2, 2\)"),
    (with_delta("u", [0.0, 0.0]), "u has shape list"),  # type: ignore[arg-type]
    (with_delta("u", torch.zeros(2, dtype=torch.float64)), r"u is torch\.float64, expected torch\.float32"),
    (with_delta("u", torch.tensor([0.0, math.nan])), "u holds values that are not finite"),
    (with_delta("a", torch.full((2, 2), math.inf)), "a holds values that are not finite"),
    (replace(GOOD, usage=None), r"usage is missing, expected shape \(1, 2\)"),
    (replace(GOOD, usage=torch.ones(2)), r"usage has shape \(2,\), expected \(1, 2\)"),
    (replace(GOOD, usage=torch.tensor([[-1.0, 5.0]])), "usage must be at least 0 and sum to num_examples=4"),
    (replace(GOOD, usage=torch.tensor([[1.0, 1.0]])), "usage must be at least 0 and sum to num_examples=4"),
    (replace(GOOD, usage=torch.tensor([[math.nan, 4.0]])), "usage must be at least 0"),
    (replace(GOOD, usage=[[2.0, 2.0]]), "usage is list"),  # type: ignore[arg-type]
    (replace(GOOD, usage=torch.tensor([[2, 2]])), r"usage is torch\.int64"),
    (replace(GOOD, usage=torch.tensor([[2, 2]], dtype=torch.complex64)), r"usage is torch\.complex64"),
    (replace(GOOD, train_loss=None), "train_loss is None"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_update_is_named_before_any_arithmetic(bad: ClientUpdate, message: str) -> None:
    with pytest.raises(UpdateError, match=f"client 'hamlet'.*{message}"):
        check_update(bad, "hamlet", 1, SERVER, ROUTERS)


def test_a_good_update_passes() -> None:
    check_update(GOOD, "hamlet", 1, SERVER, ROUTERS)


def test_usage_of_a_method_without_clusters_is_refused() -> None:
    with pytest.raises(UpdateError, match="usage is given"):
        check_update(GOOD, "hamlet", 1, SERVER, None)


def test_huge_but_finite_values_pass() -> None:
    check_update(with_delta("u", torch.full((2,), 3e38)), "hamlet", 1, SERVER, ROUTERS)


def test_clipping_scales_the_whole_update_to_the_norm() -> None:
    long = replace(GOOD, deltas={"u": torch.tensor([3.0, 0.0]), "a": torch.tensor([[0.0, 4.0], [0.0, 0.0]])})
    assert update_norm(long.deltas) == 5.0
    assert update_norm(clip_update(long, 1.0).deltas) == pytest.approx(1.0, rel=1e-6)
    assert clip_update(long, 5.0) is long


def test_what_could_overflow_the_sum_is_refused() -> None:
    server = {"w": torch.zeros(1, dtype=torch.float64)}
    huge = replace(GOOD, usage=None, deltas={"w": torch.tensor([1e307], dtype=torch.float64)})
    with pytest.raises(UpdateError, match="w holds 1e\\+307, too much to be summed"):
        check_update(huge, "hamlet", 1, server, None)
    large = replace(huge, deltas={"w": torch.tensor([1e270], dtype=torch.float64)})
    check_update(large, "hamlet", 1, server, None)
    groups = replace(GROUPS, shared=("w",), statistics=(), clustered={})
    mean = WeightedMean(server, groups, 10**6)
    mean.add(large)
    assert mean.result().deltas["w"].item() == pytest.approx(1e270)


@pytest.mark.parametrize("value", [1e10, 1e20, 3e38])
def test_an_update_is_clipped_to_the_norm_however_long_it_is(value: float) -> None:
    long = with_delta("u", torch.full((2,), value))
    assert update_norm(long.deltas) == pytest.approx(value * 2**0.5)
    assert update_norm(clip_update(long, 1.0).deltas) == pytest.approx(1.0, rel=1e-6)


def test_clipping_a_zero_update_divides_nothing() -> None:
    zero = replace(GOOD, deltas={name: torch.zeros_like(value) for name, value in SERVER.items()})
    assert clip_update(zero, 1.0) is zero
    assert update_norm({}) == 0.0


def test_entropy_is_the_clients_mean_in_nats() -> None:
    certain, uniform = torch.tensor([[5.0, 0.0]]), torch.tensor([[3.0, 3.0]])
    assert mean_entropy([certain]) == 0.0
    assert mean_entropy([certain, uniform]) == pytest.approx(math.log(2) / 2)
