"""Adaptors that have a larger rank while clients find theirs, and are compressed then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from floral_peft.federated.routing import schedule

from .clients import floral_net, tensors, trainer


SETTINGS: dict[str, Any] = {"router_update": "posterior", "search_r": 3, "rounds": 6, "prune_adaptors": False}


class StopAfter(TrainerCallback):
    def __init__(self, round: int) -> None:
        self._round = round

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop |= state.global_step == self._round
        return control


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
    made = run(tmp_path)
    lost = {record["round"]: record["lost"] for record in made.records}
    assert [round for round, layers in lost.items() if layers] == [3]
    assert all(0 < value < 1 for value in lost[3].values()) and len(lost[3]) == 2
    assert ranks(made.model) == {1} and made.model.active_peft_config.r == 1
    sent = [record["bytes_up"] for record in made.records]
    assert len(set(sent)) == 2 and sent[3] < sent[2]


def test_a_long_run_compresses_at_the_thirtieth_participation() -> None:
    assert schedule.searched_rounds(pace=0.1, rounds=1500) == 300
    assert schedule.searched_rounds(pace=1.0, rounds=60) == 30
    assert schedule.searched_rounds(pace=0.1, rounds=100) == 50


def test_clients_stay_with_their_adaptor_after_a_compression(tmp_path: Path) -> None:
    made = run(tmp_path, rounds=8, learning_rate=0.5)
    assert all(record["switches"] == 0 for record in made.records[4:])
    logits = made._private("client 0")[made._routers.name].flatten()
    assert sorted(logits.tolist()) == [0.0, 0.0, schedule.ASSIGNED]


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


def test_the_best_model_may_be_one_before_the_compression(tmp_path: Path) -> None:
    made = run(tmp_path, eval_steps=1, load_best_model_at_end=True, learning_rate=0.0)
    assert made.state.best_global_step == 1
    assert ranks(made.model) == {3} and made.model.active_peft_config.r == 3
    made.publish(tmp_path / "published")
