"""Early stopping and the best model, as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from floral_peft.federated import FederatedArguments
from floral_peft.federated.best import exported, note_evaluation, restore

from .clients import population, tensors, trainer


def after(values: list[float], **settings: Any) -> TrainerState:
    """The state after evaluations with these accuracies, one a round."""
    args, state = FederatedArguments(eval_steps=1, **settings), TrainerState()
    for state.global_step, value in enumerate(values, 1):
        note_evaluation(args, state, {"eval_accuracy": value, "eval_loss": value})
    return state


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"metric_for_best_model": "accuracy"}, (0.9, 2)),
        ({"metric_for_best_model": "eval_accuracy", "greater_is_better": False}, (0.1, 4)),
        ({"load_best_model_at_end": True}, (0.1, 4)),
        ({}, (None, None)),
    ],
)
def test_the_best_is_the_first_of_the_highest_or_of_the_lowest_loss(settings: Any, best: Any) -> None:
    state = after([0.3, 0.9, 0.9, 0.1, float("nan")], **settings)
    assert (state.best_metric, state.best_global_step) == best


def test_a_metric_that_no_evaluation_has_is_named() -> None:
    with pytest.raises(ValueError, match="has no eval_acuracy: did you mean 'eval_accuracy'"):
        after([0.1], metric_for_best_model="acuracy")


def test_a_checkpoint_sets_only_what_a_callback_remembers() -> None:
    callbacks = [EarlyStoppingCallback(2), TrainerCallback()]
    forged = {"EarlyStoppingCallback": {"on_step_end": 1, "early_stopping_patience_counter": 1}, "TrainerCallback": 7}
    restore({"callbacks": forged}, TrainerState(), callbacks)
    assert "on_step_end" not in vars(callbacks[0])
    assert vars(callbacks[0])["early_stopping_patience_counter"] == 1


def test_what_is_remembered_survives_a_checkpoint() -> None:
    stopping, again, state = EarlyStoppingCallback(3), EarlyStoppingCallback(3), TrainerState()
    stopping.early_stopping_patience_counter = 2
    restore(exported(after([0.3, 0.9], metric_for_best_model="accuracy"), [stopping]), state, [again])
    assert (state.best_metric, state.best_global_step) == (0.9, 2)
    assert again.early_stopping_patience_counter == 2
    restore({}, state, [again])
    assert state.best_metric is None


class Reverses:
    """A loss that clients minimise for three rounds of 15 batches, and maximise from then on."""

    def __init__(self) -> None:
        self.batches = 3 * 15

    def __call__(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(outputs, labels)
        self.batches -= torch.is_grad_enabled()
        return loss if self.batches >= 0 or not torch.is_grad_enabled() else -loss


LEARNED: dict[str, Any] = {
    "rounds": 8,
    "eval_steps": 1,
    "router_learning_rate": 1.0,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "save_total_limit": 1,
}


def test_a_run_ends_with_its_best_round_and_the_clients_state_of_it(tmp_path: Path) -> None:
    best = trainer(tmp_path / "a", dataset=population(num_clusters=1), rounds=3, router_learning_rate=1.0)
    best.train()
    run = trainer(tmp_path / "b", dataset=population(num_clusters=1), loss_fn=Reverses(), **LEARNED)
    assert run.train().global_step == 8
    assert run.state.best_global_step == 3
    assert run.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-3")
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-3"]
    expected, found = tensors(best.model), tensors(run.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert run.evaluate()["eval_loss"] == run.state.best_metric


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    callbacks = [EarlyStoppingCallback(2)]
    run = trainer(tmp_path, dataset=population(num_clusters=1), loss_fn=Reverses(), callbacks=callbacks, **LEARNED)
    assert run.train().global_step == 5


def test_a_resumed_run_stops_when_the_uninterrupted_one_does(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**LEARNED, "dataset": population(num_clusters=1), "save_steps": 1}
    cut = trainer(tmp_path, loss_fn=Reverses(), callbacks=[EarlyStoppingCallback(2)], **{**settings, "rounds": 4})
    assert cut.train().global_step == 4
    reversed_already = Reverses()
    reversed_already.batches = 0
    resumed = trainer(tmp_path, loss_fn=reversed_already, callbacks=[EarlyStoppingCallback(2)], **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 5
    assert resumed.state.best_global_step == 3


def test_early_stopping_needs_evaluations_and_a_metric(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="EarlyStoppingCallback needs eval_steps and metric_for_best_model"):
        trainer(tmp_path, eval_steps=1, callbacks=[EarlyStoppingCallback(1)])
    with pytest.raises(ValueError, match="load_best_model_at_end=True needs evaluations: set eval_steps"):
        trainer(tmp_path, load_best_model_at_end=True)


def test_the_newest_checkpoint_stays_beside_the_best(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataset=population(num_clusters=1), loss_fn=Reverses(), save_steps=2, **LEARNED)
    run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-8"]
