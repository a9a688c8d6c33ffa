"""FederatedTrainer, end to end."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from floral_peft.federated import (
    CheckpointError,
    ClientUpdate,
    FederatedArguments,
    FederatedDataset,
    FederatedTrainer,
    TooFewClientsError,
    method_names,
)
from floral_peft.federated.aggregation import WeightedMean

from .clients import examples, floral_net, net, population, tensors, trainer


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return json.loads(json.dumps([{k: v for k, v in record.items() if k != "seconds"} for record in records]))


# Runs


@pytest.mark.parametrize("method", method_names())
def test_a_run_learns_and_tells_of_it(tmp_path: Path, method: str) -> None:
    data = population(num_examples=40, num_clusters=1)
    run = trainer(tmp_path, method, dataset=data, rounds=8, eval_steps=4, local_epochs=2)
    first = run.evaluate()
    output = run.train()
    last = run.evaluate()
    assert output.global_step == 8
    assert output.metrics["train_loss"] == output.training_loss
    assert last["eval_loss"] < first["eval_loss"]
    assert [record["event"] for record in run.records] == [
        "evaluate",
        *["round"] * 4,
        "evaluate",
        *["round"] * 4,
        "evaluate",
        "evaluate",
    ]
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(run.records))


def test_a_rounds_record_has_its_fields(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    assert run.records[0].keys() == {
        "event",
        "round",
        "train_loss",
        "clients_trained",
        "clients_dropped",
        "update_norm",
        "router_entropy",
        "usage",
        "switches",
        "mismatch",
        "bytes_down",
        "bytes_up",
        "seconds",
        "adaptors",
        "regrets",
        "lost",
        "pruned",
        "truncation",
    }
    assert run.records[0]["seconds"].keys() == {"load", "train", "reduce", "store", "wait", "server step"}
    assert run.records[0]["bytes_up"] == run.records[0]["bytes_down"] + 2 * 8  # π̂N of two adaptors, in float64
    assert sum(run.records[0]["usage"]) == pytest.approx(1.0)


def test_true_routing_separates_clusters_that_disagree(tmp_path: Path) -> None:
    data = population(num_clients=4, num_examples=40)
    settings: dict[str, Any] = {"rounds": 12, "learning_rate": 0.3, "dataset": data}
    fedavg = trainer(tmp_path / "a", "fedavg", **settings)
    floral = trainer(tmp_path / "b", optimal_routing=True, **settings)
    fedavg.train()
    floral.train()
    assert floral.evaluate()["eval_accuracy"] > fedavg.evaluate()["eval_accuracy"] + 0.2


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        made = trainer(tmp_path / "run", clients_per_round=2, seed=seed, overwrite_output_dir=True)
        made.train()
        return tensors(made.model)

    assert equal(run(1), run(1))
    assert not equal(run(1), run(2))


def test_a_cohort_is_drawn_without_replacement_and_varies(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataset=population(10), clients_per_round=0.3)
    cohorts = [run._clients.cohort(round) for round in range(1, 30)]
    assert all(len(set(cohort)) == 3 for cohort in cohorts)
    assert len({client for cohort in cohorts for client in cohort}) == 10
    assert cohorts == [run._clients.cohort(round) for round in range(1, 30)]


def test_the_server_may_use_adam(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"server_optimizer": "adam", "server_learning_rate": 0.05}
    run = trainer(tmp_path, dataset=population(num_clusters=1), rounds=5, eval_steps=5, **settings)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.records[-1]["eval_loss"] < before


def test_a_transformers_model_is_trained_by_both_methods(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 12, "num_labels": 2}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)

    def sentences(seed: int, flip: int) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(1, 12, (24, 5), generator=generator)
        return Dataset.from_dict({"input_ids": words.tolist(), "label": ((words[:, 0] > 6).long() ^ flip).tolist()})

    data = FederatedDataset({k: sentences(k, k % 2).train_test_split(0.25, seed=0) for k in range(4)})
    base = BertForSequenceClassification(config)
    start = tensors(base)
    floral = floral_net(base, target_modules=["query", "value", "classifier"], task_type="SEQ_CLS", train_base=False)
    run = trainer(tmp_path / "a", model=floral, dataset=data, optimizer="adamw", learning_rate=0.01, eval_steps=1)
    run.train()
    assert {"eval_loss", "eval_accuracy"} <= run.records[-1].keys()
    assert run.records[0]["train_loss"] != run.records[2]["train_loss"]
    plain = BertForSequenceClassification(config)
    plain.load_state_dict(start)
    trainer(tmp_path / "b", "fedavg", plain, data, learning_rate=0.01, optimizer="adamw").train()
    assert not equal(start, tensors(plain))


def test_fedavg_trains_pefts_lora(tmp_path: Path) -> None:
    model: Any = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0", "2"]))
    before = tensors(model)
    trainer(tmp_path, "fedavg", model).train()
    changed = {name for name, value in tensors(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_a_frozen_base_stays_as_it_was(tmp_path: Path) -> None:
    model = floral_net(net(norm=True), train_base=False)
    before = tensors(model)
    trainer(tmp_path, model=model).train()
    after = tensors(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "floral_" not in name)


# The model afterwards


def test_the_trained_routers_are_in_the_model_by_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, router_learning_rate=1.0)
    run.train()
    ids, mixtures = run.mixtures()
    assert ids == list(run.dataset)
    assert mixtures.shape == (4, 2)
    assert torch.allclose(mixtures.sum(dim=1), torch.ones(4))
    assert len({tuple(row.tolist()) for row in mixtures}) == 4
    for name, row in zip(ids, mixtures, strict=True):
        with run.model.client(name):
            assert torch.equal(run.model.mixture(), row)


def test_evaluation_uses_each_clients_own_mixture(tmp_path: Path) -> None:
    run = trainer(tmp_path, router_learning_rate=1.0, rounds=3)
    run.train()
    run.evaluate()
    run.model.eval()
    for name, metrics in run.client_metrics.items():
        data = run.dataset[name]["test"]
        with run.model.client(name), torch.no_grad():
            logits = run.model(torch.tensor(data["points"][:]))
        loss = nn.functional.cross_entropy(logits, torch.tensor(data["labels"][:]))
        assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
        assert metrics["num_examples"] == 6


def test_a_second_run_goes_on_from_what_the_model_holds(tmp_path: Path) -> None:
    run = trainer(tmp_path, router_learning_rate=1.0)
    run.train()
    _, first = run.mixtures()
    run.args.router_learning_rate = 0.0
    run.train()
    assert torch.equal(run.mixtures()[1], first)
    assert [record["round"] for record in run.records] == [1, 2]


def test_a_published_adapter_has_the_trained_tensors_and_no_router(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", router_learning_rate=1.0)
    run.train()
    run.publish(tmp_path / "adapter")
    loaded: Any = peft.PeftModel.from_pretrained(net(), str(tmp_path / "adapter"))
    assert torch.equal(loaded.mixture(), torch.tensor([0.5, 0.5]))
    held = dict(run.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert "router" in name or torch.equal(parameter, held[name])
    with run.model.client("client 1"):
        assert not torch.equal(run.model.mixture(), torch.tensor([0.5, 0.5]))


def test_a_plain_model_is_published_as_safetensors(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", "fedavg")
    run.publish(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "README.md"}


# Privacy

CANARY = (1234.5678, -8765.4321)


@pytest.mark.parametrize("cohort", ["loop", "vectorized"])
def test_no_private_tensor_is_in_anything_but_the_clients_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cohort: str
) -> None:
    """Every client's router is a pattern that is searched in all that is sent, saved, logged and published."""
    data = population()
    model = floral_net(num_clients=4, client_names=list(data))
    routers = torch.tensor(CANARY) + torch.arange(4.0)[:, None]
    model.set_routers(routers[:, None], list(data))
    sent: list[bytes] = []
    add = WeightedMean.add

    def noting(mean: WeightedMean, update: ClientUpdate) -> None:
        told = {**update.deltas, "usage": torch.empty(0) if update.usage is None else update.usage}
        sent.append(repr(update).encode() + b"".join(value.numpy().tobytes() for value in told.values()))
        add(mean, update)

    monkeypatch.setattr(WeightedMean, "add", noting)
    settings: dict[str, Any] = {
        "dataset": data,
        "router_learning_rate": 0.0,
        "save_steps": 1,
        "eval_steps": 1,
        "server_optimizer": "adam",
        "cohort": cohort,
    }
    with caplog.at_level(logging.DEBUG):
        trainer(tmp_path, model=model, **settings).train()
        run = trainer(tmp_path, model=model, rounds=3, **settings)
        run.train(resume_from_checkpoint=True)
        run.publish(tmp_path / "published")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in files if "private" not in path.parts]
    everything = [*contents, *sent, caplog.text.encode(), json.dumps(run.records).encode()]
    assert len(sent) == 4 * 3
    for router in routers:
        patterns = [value.to(kind).numpy().tobytes() for value in router for kind in (torch.float32, torch.float64)]
        patterns += [f"{float(value):.6}"[:7].encode() for value in router]
        assert not any(pattern in content for pattern in patterns for content in everything)
        stored = [path for path in files if "private" in path.parts and patterns[0] in path.read_bytes()]
        assert stored, "the pattern is not even where it belongs"


# Checkpoints


class StopAfter(TrainerCallback):
    def __init__(self, round: int) -> None:
        self.round = round

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.round:
            raise KeyboardInterrupt


SETTINGS: dict[str, Any] = {
    "rounds": 6,
    "save_steps": 2,
    "eval_steps": 3,
    "clients_per_round": 3,
    "router_learning_rate": 1.0,
    "server_optimizer": "adam",
    "server_learning_rate": 0.02,
}


@pytest.mark.parametrize("method", method_names())
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, method: str) -> None:
    whole = trainer(tmp_path / "whole", method, **SETTINGS)
    whole.train()
    cut = trainer(tmp_path / "cut", method, callbacks=[StopAfter(5)], **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer(tmp_path / "cut", method, **SETTINGS)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    assert equal(tensors(whole.model), tensors(resumed.model))
    assert without_seconds(whole.records) == without_seconds(resumed.records)
    assert whole.evaluate() == resumed.evaluate()


def test_an_older_checkpoint_resumes_with_the_clients_state_of_its_round(tmp_path: Path) -> None:
    whole = trainer(tmp_path, **SETTINGS)
    whole.train()
    again = trainer(tmp_path, **SETTINGS)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(tensors(whole.model), tensors(again.model))


def test_a_finished_run_is_loaded_by_resuming_it(tmp_path: Path) -> None:
    whole = trainer(tmp_path, **SETTINGS)
    whole.train()
    loaded = trainer(tmp_path, **SETTINGS, resume_from_checkpoint="true")
    assert loaded.train().global_step == 6
    assert equal(tensors(whole.model), tensors(loaded.model))
    with loaded.model.client("client 2"):
        assert torch.equal(loaded.model.mixture(), whole.mixtures()[1][2])


def test_checkpoints_follow_save_steps_and_the_limit(tmp_path: Path) -> None:
    trainer(tmp_path, rounds=7, save_steps=3, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path: Path) -> None:
    trainer(tmp_path, save_steps=2).train()
    with pytest.raises(ValueError, match=r"holds the checkpoints of an earlier run.*resume_from_checkpoint=True"):
        trainer(tmp_path, save_steps=2).train()


def test_there_must_be_something_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    trainer(tmp_path, save_steps=2).train()
    with pytest.raises(CheckpointError, match=r"FloralConfig\.r was 2, now it is 1"):
        trainer(tmp_path, model=floral_net(r=1)).train(resume_from_checkpoint=True)


# Callbacks


class Listener(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"begin {state.global_step}/{state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.events.append(f"round {state.global_step}")
        assert not any(value.any() for value in (dict(model.named_parameters())[model_router(model)],))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.events.append(f"evaluate {'eval_accuracy' in metrics}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("end")


def model_router(model: Any) -> str:
    return next(name for name, _ in model.named_parameters() if "router" in name)


def test_callbacks_are_called_as_in_transformers_and_see_no_clients_router(tmp_path: Path) -> None:
    listener = Listener()
    trainer(tmp_path, rounds=3, eval_steps=2, save_steps=3, callbacks=[listener], router_learning_rate=1.0).train()
    assert listener.events == [
        "begin 0/3",
        "round 1",
        "round 2",
        "evaluate True",
        "round 3",
        "evaluate True",
        "save",
        "end",
    ]
    assert {"loss", "update_norm", "clients_per_second", "router_entropy", "usage_0"} <= listener.logs[0].keys()


class StopEarly(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step == 2
        return control


def test_a_callback_can_stop_the_training(tmp_path: Path) -> None:
    assert trainer(tmp_path, rounds=9, callbacks=[StopEarly]).train().global_step == 2


def test_the_progress_bar_counts_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, disable_tqdm=False, eval_steps=1).train()
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "eval_accuracy=" in shown


def test_trackers_get_every_rounds_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, set[str]]] = []
    monkeypatch.setattr("floral_peft.federated.arguments.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda names, folder: names)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda self, project, config: told.append((0, set())))
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: told.append((step, set(values))))
    trainer(tmp_path, report_to="all", eval_steps=2).train()
    assert [step for step, _ in told] == [0, 1, 2, 2]
    assert {"loss", "update_norm", "usage_1"} <= told[1][1]
    assert "eval_accuracy" in told[3][1]


# Clients that are small, empty or broken


def lopsided() -> FederatedDataset:
    few = examples(12)
    return FederatedDataset(
        {
            "usual": DatasetDict(train=examples(12), test=examples(6)),
            "single": DatasetDict(train=examples(1), test=examples(1)),
            "empty": DatasetDict(train=few.select([]), test=examples(3)),
            "one class": few.filter(lambda example: example["labels"] == 0),
        }
    )


@pytest.mark.parametrize("method", ["floral", "fedavg"])
def test_small_and_empty_clients_give_no_nan(tmp_path: Path, method: str) -> None:
    base = net(norm=True)
    run = trainer(tmp_path, method, floral_net(base) if method == "floral" else base, lopsided(), eval_steps=1)
    run.train()
    rounds = [record for record in run.records if record["event"] == "round"]
    assert all(record["clients_dropped"].keys() == {"empty"} for record in rounds)
    assert all(bool(value.isfinite().all()) for value in tensors(run.model).values())
    assert run.client_metrics.keys() == {"usual", "single", "empty"}


def test_an_empty_client_changes_nothing(tmp_path: Path) -> None:
    data = lopsided()
    without = FederatedDataset({name: splits for name, splits in data.items() if name != "empty"})
    runs = [trainer(tmp_path / str(k), dataset=clients) for k, clients in enumerate((data, without))]
    for run in runs:
        run.train()
    public = runs[0]._groups.public
    assert all(torch.equal(tensors(runs[0].model)[name], tensors(runs[1].model)[name]) for name in public)


def broken() -> FederatedDataset:
    def fail(rows: Any) -> Any:
        raise OSError("the disk is gone")

    return FederatedDataset({"broken": examples(5).with_transform(fail), **population()})


def test_a_client_that_raises_costs_its_own_update_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, hurt = trainer(tmp_path / "a", dataset=population()), trainer(tmp_path / "b", dataset=broken())
    whole.train()
    hurt.train()
    assert hurt.records[0]["clients_dropped"] == {"broken": "OSError"}  # its text might quote a client's examples
    assert "the disk is gone" in caplog.text
    public = whole._groups.public
    assert all(torch.equal(tensors(whole.model)[name], tensors(hurt.model)[name]) for name in public)
    assert torch.equal(hurt.mixtures()[1][0], torch.tensor([0.5, 0.5]))


class Hoards:
    """A loss that holds much when it runs out of memory, which it does in a round's first batch."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.held: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not self.held:
            much = outputs.detach() + torch.zeros(1000, 1, 1)
            self.held.append(weakref.ref(much))
            raise self.error("no room for it")
        return nn.functional.cross_entropy(outputs, labels)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_client_that_runs_out_of_memory_costs_its_own_update_and_gives_back_what_it_held(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    everybody = population()
    others = FederatedDataset({name: splits for name, splits in everybody.items() if name != "client 0"})
    hoards = Hoards(error)
    hurt = trainer(tmp_path / "a", dataset=everybody, loss_fn=hoards, rounds=1)
    whole = trainer(tmp_path / "b", dataset=others, rounds=1)
    hurt.train()
    whole.train()
    assert hurt.records[0]["clients_dropped"] == {"client 0": error.__name__}
    assert "no room for it" in caplog.text
    assert [held() for held in hoards.held] == [None]
    assert all(parameter.grad is None for parameter in hurt.model.parameters())
    assert all(torch.equal(tensors(whole.model)[name], tensors(hurt.model)[name]) for name in hurt._groups.public)


def test_a_diverging_client_is_dropped_and_named(tmp_path: Path) -> None:
    wild = Dataset.from_dict({"points": [[float("inf")] * 4] * 3, "labels": [0, 1, 2]})
    run = trainer(tmp_path, dataset=FederatedDataset({**population(), "wild": wild}))
    run.train()
    assert "not finite" in run.records[0]["clients_dropped"]["wild"]
    assert all(bool(value.isfinite().all()) for value in tensors(run.model).values())


def test_a_round_with_too_few_clients_changes_nothing_and_says_why(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataset=broken(), min_clients=5)
    before = tensors(run.model)
    with pytest.raises(TooFewClientsError, match=r"4 clients sent.*min_clients=5.*client 'broken': OSError"):
        run.train()
    after = tensors(run.model)
    assert all(torch.equal(before[name], after[name]) for name in run._groups.public)
    assert run.records == []


# Mistakes

MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": 3}, TypeError, "model must be a Module, got int"),
    ({"args": {"rounds": 3}}, TypeError, "args must be a FederatedArguments, got dict"),
    ({"dataset": {"a": 1}}, TypeError, "dataset must be a FederatedDataset, got dict"),
    ({"data_collator": [1]}, TypeError, "data_collator must be a function, got list"),
    ({"compute_metrics": "accuracy"}, TypeError, "compute_metrics must be a function, got str"),
    ({"loss_fn": 1}, TypeError, "loss_fn must be a function, got int"),
    ({"callbacks": TrainerCallback()}, TypeError, "callbacks must be a list of TrainerCallbacks, got TrainerCallback"),
    ({"method": "flora"}, ValueError, 'Did you mean "floral"'),
    ({"model": net()}, ValueError, 'method "floral" needs a model with FLORAL adaptors'),
    ({"method": "fedavg", "model": floral_net()}, ValueError, "has a FLORAL router"),
    ({"args": FederatedArguments(clients_per_round=5)}, ValueError, "clients_per_round=5 is more than"),
    ({"args": FederatedArguments(min_clients=5)}, ValueError, "min_clients=5 is more than the 4 clients of a round"),
    (
        {"args": FederatedArguments(optimal_routing=True), "dataset": FederatedDataset({"a": examples(4)})},
        ValueError,
        "optimal_routing=True needs the true clusters",
    ),
    (
        {"args": FederatedArguments(optimal_routing=True), "dataset": population(4, num_clusters=3)},
        ValueError,
        "client 'client 2' is of cluster 2, but the model has only 2 adaptors",
    ),
    (
        {"args": FederatedArguments(optimal_routing=True), "method": "fedavg", "model": net()},
        ValueError,
        "this one has no router",
    ),
]


@pytest.mark.parametrize(("given", "kind", "message"), MISTAKES)
def test_a_mistake_is_named_when_the_trainer_is_made(
    given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    usual: dict[str, Any] = {"model": floral_net(), "args": FederatedArguments(), "dataset": population()}
    with pytest.raises(kind, match=message):
        FederatedTrainer(**(usual | given))


def unlabelled() -> FederatedDataset:
    return FederatedDataset({k: examples(5).rename_column("labels", "target") for k in range(4)})


def test_a_mistake_that_all_clients_share_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'no column "labels"; its columns: \[.points., .target.\]'):
        trainer(tmp_path, dataset=unlabelled()).train()


def test_a_wrong_shape_is_named_before_training_without_a_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = FederatedDataset({k: examples(5, num_features=7) for k in range(2)})
    with pytest.raises(ValueError, match=r"client 0: the model cannot be run.*RuntimeError: mat1 and.*Check that"):
        trainer(tmp_path / "run", dataset=data).train()
    assert caplog.text == ""
    assert not (tmp_path / "run").exists()


def test_labels_beyond_the_models_outputs_are_named_before_training(tmp_path: Path) -> None:
    def counted_from_one(k: int) -> Any:
        held = examples(12, seed=k)
        labels = sorted(held["labels"][:])  # the first examples tell nothing
        return held.remove_columns("labels").add_column("labels", [label + 1 for label in labels])

    data = FederatedDataset({k: counted_from_one(k) for k in range(2)})
    with pytest.raises(ValueError, match=r"client 0: .*Target 3 is out of bounds.*the labels' range"):
        trainer(tmp_path, dataset=data, router_update="posterior").train()


def test_an_evaluation_without_test_examples_is_named(tmp_path: Path) -> None:
    data = FederatedDataset({k: examples(5) for k in range(2)})
    with pytest.raises(ValueError, match='no client has examples in a split "test"'):
        trainer(tmp_path, dataset=data).evaluate()
    with pytest.raises(ValueError, match='eval_steps=1: no client has examples in a split "test"'):
        trainer(tmp_path, dataset=data, eval_steps=1).train()


def test_mixtures_need_routers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no FLORAL adaptors"):
        trainer(tmp_path, "fedavg").mixtures()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_a_run_on_an_accelerator_learns_as_on_the_cpu(tmp_path: Path, precision: dict[str, Any]) -> None:
    settings: dict[str, Any] = {**SETTINGS, "dataset": population(num_clusters=1)}
    slow, fast = trainer(tmp_path / "a", **settings), trainer(tmp_path / "b", **settings, use_cpu=False, **precision)
    slow.train()
    fast.train()
    again = trainer(tmp_path / "b", **settings, use_cpu=False, **precision)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert {value.device.type for value in tensors(fast.model).values()} == {fast.accelerator.device.type} != {"cpu"}
    assert equal(tensors(fast.model), tensors(again.model))
    assert fast.evaluate()["eval_loss"] == pytest.approx(slow.evaluate()["eval_loss"], rel=0.05)
