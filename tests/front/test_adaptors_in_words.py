"""What a report says of a run's adaptors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from floral_peft.reports import adaptors_in_words
from floral_peft.reports.runs import Run
from floral_peft.reports.series import usage


def run_of(*records: dict[str, Any]) -> Any:
    rounds = [{"event": "round", "round": at, **record} for at, record in enumerate(records, 1)]
    made = Run.__new__(Run)
    object.__setattr__(made, "records", rounds)
    object.__setattr__(made, "folder", Path("run"))
    return made


GONE = {"adaptor": 1, "why": "dead", "share": 0.0, "instead": None, "regret": None}
LIKE = {"adaptor": 2, "why": "dispensable", "share": 0.1, "instead": 0, "regret": 0.05}
LATER = {"usage": [0.6, 0.399, 0.001], "adaptors": [0, 3, 4]}
PRUNED = run_of({"usage": [0.2] * 5, "adaptors": [0, 1, 2, 3, 4], "pruned": [GONE, LIKE]}, {**LATER, "pruned": []})


def test_removed_adaptors_are_told_with_their_reason_and_those_hardly_used() -> None:
    assert adaptors_in_words(PRUNED) == (
        "3 of 5 adaptors are left; removed: 1 (dead, round 1), 2 (most like 0, round 1); hardly used: 4."
    )


def test_adaptors_that_became_one_are_not_called_dead() -> None:
    pooled = [{**GONE, "adaptor": number, "why": "pooled", "share": 0.3} for number in (1, 2)]
    words = adaptors_in_words(run_of({"usage": [0.4, 0.3, 0.3], "pruned": pooled}, {"usage": [1.0], "adaptors": [0]}))
    assert words == "1 of 3 adaptors are left; removed: 1 (pooled, round 1), 2 (pooled, round 1)."


def test_who_goes_because_more_were_left_than_may_stay_is_not_called_a_duplicate() -> None:
    words = adaptors_in_words(run_of({"usage": [0.5, 0.3, 0.2], "pruned": [{**LIKE, "why": "bound"}]}))
    assert words == "2 of 3 adaptors are left; removed: 2 (more than may stay, most like 0, round 1)."


def test_duplicates_are_told_once() -> None:
    regrets = [[0, 0.02, 0.9], [0.03, 0, 0.9], [0.05, 0.9, 0]]
    words = adaptors_in_words(run_of({"usage": [0.4, 0.3, 0.3], "adaptors": [0, 1, 2], "regrets": regrets}))
    assert words == "3 of 3 adaptors are left; duplicates: 0 like 1, 2 like 0."


def test_a_run_without_adaptors_has_no_words() -> None:
    assert adaptors_in_words(run_of({"usage": None}, {"usage": None})) is None


def test_usage_is_drawn_by_the_first_numbers() -> None:
    found = usage(PRUNED)
    assert found is not None
    assert found[1].tolist() == [[0.2, 0.6], [0.2, 0.0], [0.2, 0.0], [0.2, 0.399], [0.2, 0.001]]
