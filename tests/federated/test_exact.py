"""Sums with the same bits in any order and over any split, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from torch import Tensor

from floral_peft.federated import exact
from floral_peft.federated.exact import ExactSum


Terms = list[tuple[Tensor, int]]


@pytest.fixture(autouse=True, params=["at once", "two by two", "together"])
def _waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small terms wait for others; large ones do not. The sums are the same."""
    if request.param == "at once":
        monkeypatch.setattr(exact, "_SMALL", -1)
    elif request.param == "two by two":
        monkeypatch.setattr(exact, "_TOGETHER", 2)


def total(terms: Terms, capacity: int | None = None) -> ExactSum:
    found = ExactSum(terms[0][0], capacity or len(terms))
    for value, weight in terms:
        found.add(value, weight, float(value.abs().max()) * weight)
    return found


def merged(first: ExactSum, *others: ExactSum) -> Tensor:
    """What an all-reduce over processes does."""
    classes = sorted({chosen for part in (first, *others) for chosen in part.classes()})
    for other in others:
        for mine, theirs in zip(first.parts(classes), other.parts(classes), strict=True):
            mine += theirs
    return first.result()


def random_terms(count: int, size: int = 50, spread: float = 0.0, dtype: torch.dtype = torch.float32) -> Terms:
    generator = torch.Generator().manual_seed(count)
    terms = []
    for _ in range(count):
        scale = 10.0 ** float(spread * (2 * torch.rand((), generator=generator) - 1))
        value = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        terms.append((value.to(dtype), int(torch.randint(1, 3000, (), generator=generator))))
    return terms


@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0])
def test_every_order_gives_the_same_bits(spread: float) -> None:
    terms = random_terms(5, spread=spread)
    expected = total(terms).result()
    assert all(torch.equal(total(list(order)).result(), expected) for order in permutations(terms))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_every_split_over_processes_gives_the_same_bits(processes: int, spread: float) -> None:
    terms = random_terms(30, spread=spread)
    parts = [total(terms[rank::processes], capacity=30) for rank in range(processes)]
    assert torch.equal(merged(*parts), total(terms).result())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 10, 1000])
def test_the_sum_is_as_good_as_its_largest_terms_allow(count: int, dtype: torch.dtype) -> None:
    terms = random_terms(count, size=7, dtype=dtype)
    found = total(terms).result()
    largest = max(float(value.abs().max()) * weight for value, weight in terms)
    for index in range(7):
        exact = float(sum(Fraction(float(value[index])) * weight for value, weight in terms))
        # Each term is within half a step of a grid of 52 − 8 − ⌈log₂ count⌉ bits.
        assert abs(found[index].item() - exact) <= count * largest * 2.0 ** (8 + count.bit_length() - 52)


def test_float32_terms_of_like_magnitude_are_summed_exactly() -> None:
    terms = [(torch.tensor([0.1, -0.3, 0.7]), 1 + k % 5) for k in range(1000)]
    exact = [sum(Fraction(float(value[i])) * weight for value, weight in terms) for i in range(3)]
    assert total(terms).result().tolist() == [float(value) for value in exact]


def test_a_small_term_is_not_swallowed_by_a_large_one_that_is_taken_back() -> None:
    terms = [(torch.tensor([1e30]), 1), (torch.tensor([1e-3]), 1), (torch.tensor([-1e30]), 1)]
    assert [total(list(order)).result().item() for order in permutations(terms)] == [float(torch.tensor(1e-3))] * 6


def test_ties_are_decided_by_the_term_alone() -> None:
    # The peak 1 sets the grid; halves and three halves of it lie between two of its points.
    grid = 2.0 ** (8 + 3 - 52)
    terms = [(torch.tensor([1.0, k * grid / 2], dtype=torch.float64), 1) for k in (1, 3, -1, 5, 7)]
    expected = total(terms).result()
    assert all(torch.equal(total(list(order)).result(), expected) for order in permutations(terms))
    assert expected[1].item() % grid == 0


def test_zeros_add_nothing_and_an_empty_sum_is_zero() -> None:
    found = total([(torch.zeros(3), 5)])
    assert found.classes() == []
    assert found.result().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [1e-45, 1e-38, 3.4e38])
def test_the_ends_of_float32_are_summed_exactly(value: float) -> None:
    terms = [(torch.tensor([value]), 1000)] * 3
    assert total(terms).result().item() == 3000 * float(torch.tensor(value))


def test_the_ends_of_float64_neither_overflow_nor_divide_by_zero() -> None:
    tiny = [(torch.tensor([5e-324], dtype=torch.float64), 7)] * 3
    huge = [(torch.tensor([1e300], dtype=torch.float64), 1000)] * 3
    assert total(tiny).result().item() == 0.0
    assert total(huge).result().item() == pytest.approx(3e303, rel=1e-9)


def test_a_term_at_the_edge_of_its_class_fits() -> None:
    for exponent in range(-10, 11):
        for value in (2.0**exponent, math.nextafter(2.0**exponent, 0.0)):
            term = torch.tensor([value, -value], dtype=torch.float64)
            assert total([(term, 1)] * 2).result()[0].item() == pytest.approx(2 * value, rel=1e-12)


def test_weights_may_differ_along_an_axis() -> None:
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = ExactSum(value, 1)
    found.add(value, torch.tensor([0.5, 3.0], dtype=torch.float64), 12.0)
    assert found.result().tolist() == [[0.5, 6.0], [1.5, 12.0]]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("used", [[1], [0, 3], []])
def test_a_term_that_is_zero_elsewhere_adds_the_same_bits_by_its_part(axis: int, used: list[int]) -> None:
    generator = torch.Generator().manual_seed(axis)
    shape, numbers = [3, 2, 5], torch.tensor(used, dtype=torch.int64)
    shape[axis] = 4
    weight = torch.zeros(4, dtype=torch.float64).index_fill(0, numbers, 1 / 3)
    weight = weight.view([-1 if dim == axis else 1 for dim in range(3)])
    whole, parts = ExactSum(torch.zeros(shape), 3), ExactSum(torch.zeros(shape), 3)
    scratch = torch.full([60], torch.nan, dtype=torch.float64)
    for _ in range(3):
        value = torch.randn(shape, generator=generator)
        bound = float(value.abs().max())
        whole.add(value, weight, bound)
        parts.add(value, weight, bound, scratch, (axis, numbers))
    assert torch.equal(parts.result(), whole.result())
    assert bool(whole.result().any()) == bool(used)
