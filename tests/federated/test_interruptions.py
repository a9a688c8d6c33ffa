"""What survives an interruption, a failure, a second run or a look at the model: everything that was there before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from floral_peft.federated import CheckpointError, FederatedDataset, Method, TooFewClientsError

from .clients import examples, floral_net, net, population, tensors, trainer


LEARNED: dict[str, Any] = {"router_learning_rate": 5.0, "rounds": 5}


class FailsLater:
    """A loss that is well for some calls."""

    def __init__(self, calls: int, how: type[BaseException] | float) -> None:
        self.calls, self.how = calls, how

    def __call__(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls -= torch.is_grad_enabled()
        loss = nn.functional.cross_entropy(outputs, labels)
        if self.calls >= 0:
            return loss
        if isinstance(self.how, float):
            return loss * self.how
        raise self.how


# An interrupted round


@pytest.mark.parametrize("how", [KeyboardInterrupt, float("nan")])
def test_an_interrupted_round_loses_nothing_of_the_rounds_before(tmp_path: Path, how: Any) -> None:
    data = FederatedDataset({k: DatasetDict(train=examples(12, seed=k), test=examples(4)) for k in range(4)})
    two_rounds = trainer(tmp_path / "a", dataset=data, **{**LEARNED, "rounds": 2})
    two_rounds.train()
    calls = 2 * 4 * 3 + 2 * 3 + 1  # two rounds, and two clients of the third
    cut = trainer(tmp_path / "b", dataset=data, loss_fn=FailsLater(calls, how), min_clients=4, **LEARNED)
    with pytest.raises((KeyboardInterrupt, TooFewClientsError)):
        cut.train()
    assert torch.equal(cut.mixtures()[1], two_rounds.mixtures()[1])
    assert all(torch.equal(one, other) for one, other in zip(
        tensors(cut.model).values(), tensors(two_rounds.model).values(), strict=True
    ))  # fmt: skip
    assert not any(path.name.startswith("3-") for path in (tmp_path / "b" / "private").rglob("*"))


def test_a_run_that_was_killed_after_going_back_does_not_mix_with_its_former_future(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**LEARNED, "rounds": 6, "save_steps": 2}
    trainer(tmp_path / "a", **settings).train()
    cut = trainer(tmp_path / "a", loss_fn=FailsLater(4 * 4, KeyboardInterrupt), **settings)
    with pytest.raises(KeyboardInterrupt):
        cut.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert [path.name for path in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-2"]
    whole, again = trainer(tmp_path / "b", **settings), trainer(tmp_path / "a", **settings)
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert torch.equal(whole.mixtures()[1], again.mixtures()[1])


class PrivateHead(Method):
    name = "private_head"

    def group(self, name: str, role: Any) -> Any:
        return "private" if name.startswith("2.") else "shared"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, None])
def test_what_is_private_is_never_published(tmp_path: Path, interrupt: Any) -> None:
    def compute_metrics(prediction: Any) -> dict[str, float]:
        if interrupt:
            raise interrupt
        raise ValueError("broken")

    model: Any = net()
    start = tensors(model)
    run = trainer(tmp_path, PrivateHead(), model, compute_metrics=compute_metrics)  # type: ignore[arg-type]
    run.train()
    with pytest.raises((KeyboardInterrupt, ValueError)):
        run.evaluate()
    assert torch.equal(tensors(model)["2.weight"], start["2.weight"])
    with torch.no_grad():
        model[2].weight.fill_(7.0)
    run.publish(tmp_path / "published")
    published = load_file(tmp_path / "published" / "model.safetensors")
    assert torch.equal(published["2.weight"], start["2.weight"])
    assert not torch.equal(published["0.weight"], start["0.weight"])


# Resuming another run


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 3}, "seed was 42, now it is 3"),
        ({"learning_rate": 0.2}, "learning_rate was 0.1, now it is 0.2"),
        ({"optimal_routing": True}, "optimal_routing was False"),
        ({"dataset": population(5)}, "the clients' ids was"),
        ({"model": floral_net(alpha=2.0)}, r"FloralConfig\.alpha was 1\.0, now it is 2\.0"),
        ({"model": floral_net(router_temperature=2.0)}, r"FloralConfig\.router_temperature was"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    trainer(tmp_path, save_steps=1).train()
    with pytest.raises(CheckpointError, match=f"is of another run: .*{name}"):
        trainer(tmp_path, save_steps=1, **change).train(resume_from_checkpoint=True)


def test_a_resumed_run_may_be_longer_and_save_otherwise(tmp_path: Path) -> None:
    trainer(tmp_path, save_steps=1).train()
    longer = trainer(tmp_path, rounds=3, save_steps=2, eval_steps=1, save_total_limit=9)
    assert longer.train(resume_from_checkpoint=True).global_step == 3


def test_a_resumed_run_cannot_end_before_it_begins(tmp_path: Path) -> None:
    trainer(tmp_path, rounds=2, save_steps=1).train()
    with pytest.raises(CheckpointError, match=r"checkpoint-2 has 2 rounds behind it, and rounds=1 are asked for"):
        trainer(tmp_path, rounds=1).train(resume_from_checkpoint=True)
    earlier = trainer(tmp_path, rounds=1)
    assert earlier.train(resume_from_checkpoint=tmp_path / "checkpoint-1").global_step == 1


def test_another_run_is_overwritten_by_explicit_choice_only(tmp_path: Path) -> None:
    first = trainer(tmp_path, **LEARNED)
    first.train()
    mixtures = first.mixtures()[1]
    with pytest.raises(ValueError, match=r"the clients' state of an earlier run.*overwrite_output_dir=True"):
        trainer(tmp_path).train()
    trainer(tmp_path).evaluate()  # a look leaves the other run's records alone
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 5
    assert torch.equal(first.mixtures()[1], mixtures)
    second = trainer(tmp_path, overwrite_output_dir=True, save_steps=1)
    second.train()
    assert [record["round"] for record in second.records] == [1, 2]
    third = trainer(tmp_path, overwrite_output_dir=True)
    third.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# The model is left as it was


def test_a_look_at_the_model_leaves_numbered_routers_alone_and_uses_them(tmp_path: Path) -> None:
    data = FederatedDataset({k: splits for k, splits in enumerate(population().values())})
    model = floral_net(num_clients=4)
    logits = torch.randn(4, 1, 2)
    model.set_routers(logits)
    model.set_client(2)
    run = trainer(tmp_path / "new", model=model, dataset=data)
    run.evaluate()
    run.publish(tmp_path / "published")
    assert torch.allclose(run.mixtures()[1], logits[:, 0].softmax(dim=-1))
    assert torch.equal(model.router.logits["default"], logits)
    assert (model.active_peft_config.num_clients, model.active_peft_config.client_names) == (4, None)
    assert torch.equal(model.mixture(), model.mixture(2))


def test_training_keeps_the_routers_of_other_clients(tmp_path: Path) -> None:
    model = floral_net(num_clients=3, client_names=["a", "client 1", "c"])
    logits = torch.randn(3, 1, 2)
    model.set_routers(logits, ["a", "client 1", "c"])
    run = trainer(tmp_path, model=model, router_learning_rate=0.0)
    run.evaluate()
    assert model.active_peft_config.client_names == ["a", "client 1", "c"]
    run.train()
    assert model.active_peft_config.client_names == ["a", "client 1", "c", "client 0", "client 2", "client 3"]
    assert torch.equal(model.router.logits["default"][:3], logits)


def test_the_users_generators_and_modes_are_left_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_steps=1)
    run.model.eval()
    run.model.base_model.model[0].train()
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    run.train()
    run.evaluate()
    assert (torch.rand(1), np.random.rand()) == expected
    assert not run.model.training
    assert run.model.base_model.model[0].training


def test_trainers_of_different_precision_do_not_disturb_each_other(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(k), bf16=bf16) for k, bf16 in enumerate((True, False, True))]
    for run, bf16 in zip(runs, (True, False, True), strict=True):
        with run.accelerator.autocast():
            assert torch.is_autocast_enabled("cpu") == bf16
        assert run.accelerator.mixed_precision == ("bf16" if bf16 else "no")


# Evaluation


def test_the_accuracy_before_training_needs_no_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path / "new" / "folder")
    first = run.evaluate()
    run.train()
    assert run.records[0]["eval_loss"] == first["eval_loss"]
    assert (tmp_path / "new" / "folder" / "records.jsonl").read_text().startswith('{"event": "evaluate", "round": 0')


def test_a_client_whose_test_data_is_bad_costs_its_own_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Dataset.from_dict({"points": [[0.0] * 4], "labels": [7]})
    data = FederatedDataset({**population(), "bad": DatasetDict(train=examples(5), test=bad)})
    run = trainer(tmp_path, dataset=data, eval_steps=1)
    run.train()
    assert run.client_metrics.keys() == population().keys()
    assert run.records[-1]["clients_failed"] == {"bad": "IndexError"}
    assert "client 'bad': IndexError: Target 7" in caplog.text
    with pytest.raises(ValueError, match="no client can be evaluated; client 'bad': IndexError: Target 7"):
        alone = FederatedDataset({"bad": data["bad"]})
        trainer(tmp_path / "alone", dataset=alone).evaluate()


class StopAfterTwo(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= 2
        return control


def test_a_stopped_run_ends_with_an_evaluation_and_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, rounds=9, eval_steps=9, save_steps=9, callbacks=[StopAfterTwo])
    assert run.train().global_step == 2
    assert (run.records[-1]["event"], run.records[-1]["round"]) == ("evaluate", 2)
    assert (tmp_path / "checkpoint-2" / "manifest.json").is_file()


@pytest.mark.parametrize("callback", [print, "x", int])
def test_what_is_no_callback_is_refused(tmp_path: Path, callback: Any) -> None:
    with pytest.raises(TypeError, match="callbacks must be TrainerCallbacks or classes of them, got"):
        trainer(tmp_path, callbacks=[callback])


# Arithmetic


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_an_optimisers_own_decay_never_touches_the_router(tmp_path: Path, decay: float) -> None:
    model = floral_net(num_clients=4)
    model.set_routers(torch.full((4, 1, 2), 2.0), list(population()))
    rates: dict[str, Any] = {"learning_rate": 0.1, "adaptor_learning_rate": 0.1, "router_learning_rate": 10.0}
    weight = "base_model.model.0.base_layer.weight"
    before = tensors(model)[weight]

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 0 * outputs.sum()

    trainer(tmp_path, model=model, optimizer="adamw", weight_decay=decay, loss_fn=loss_fn, **rates).train()
    assert torch.equal(model.router.logits["default"], torch.full((4, 1, 2), 2.0))
    assert torch.equal(tensors(model)[weight], before) == (decay == 0)


@pytest.mark.parametrize("temperature", [0.01, 5000.0])
def test_optimal_routing_is_exact_at_any_temperature(tmp_path: Path, temperature: float) -> None:
    run = trainer(tmp_path, model=floral_net(router_temperature=temperature), optimal_routing=True)
    assert torch.equal(run.mixtures()[1], torch.eye(2)[[0, 1, 0, 1]])
