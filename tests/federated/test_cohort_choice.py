"""Which kind of training a run's clients get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floral_peft.federated import FederatedDataset, ServerState, cohort_choice
from floral_peft.federated.cohort import InTurn
from floral_peft.federated.cohort_choice import build_training, choose_kind
from floral_peft.federated.side_by_side import SideBySide

from .clients import examples, trainer


class Chooser:
    """Chooses for the clients of one trainer, as often as it is asked."""

    def __init__(self, folder: Path, clients: int = 3, **settings: Any) -> None:
        dataset = FederatedDataset({k: examples(5, seed=k) for k in range(clients)})
        self.trainer = made = trainer(folder, "fedavg", dataset=dataset, **settings)
        self.path = folder / "cohort.json"
        self.place = made._place

    def load(self, client_id: Any) -> Any:
        return self.trainer.dataset[client_id]["train"], self.trainer._clients.private(client_id)

    def choose(self, round: int = 0) -> str:
        state = ServerState.of(self.trainer.model, self.trainer._groups)
        state = ServerState(round, state.tensors)
        with self.trainer._visit():
            return choose_kind(self.place, list(self.trainer.dataset), self.load, state, self.path)


def timed(monkeypatch: pytest.MonkeyPatch, loop: float, vectorized: float) -> list[str]:
    """Let the kinds take these seconds per client. Returns the list of what was timed."""
    seen: list[str] = []

    def take(training: Any, *given: Any) -> float:
        seen.append(type(training).__name__)
        return loop if isinstance(training, InTurn) else vectorized

    monkeypatch.setattr(cohort_choice, "CPU_CLIENTS", 2)
    monkeypatch.setattr(cohort_choice, "_time", take)
    return seen


@pytest.mark.parametrize(
    ("loop", "vectorized", "kind"), [(3.0, 1.0, "vectorized"), (1.0, 1.0, "loop"), (1, 3, "loop")]
)
def test_auto_keeps_the_one_that_is_clearly_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: float, vectorized: float, kind: str
) -> None:
    timed(monkeypatch, loop, vectorized)
    chooser = Chooser(tmp_path, cohort="auto")
    assert chooser.choose() == kind
    assert json.loads(chooser.path.read_text()) == {
        "cohort": kind,
        "device": "cpu",
        "seconds_per_client": {"loop": loop, "vectorized": vectorized},
        "reason": None,
    }


def test_both_kinds_are_really_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort_choice, "CPU_CLIENTS", 2)
    chooser = Chooser(tmp_path, cohort="auto")
    assert chooser.choose() in ("loop", "vectorized")
    seconds = json.loads(chooser.path.read_text())["seconds_per_client"]
    assert seconds.keys() == {"loop", "vectorized"}
    assert all(0 < value < 10 for value in seconds.values())


def test_a_resumed_run_does_not_choose_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 3.0, 1.0)
    chooser = Chooser(tmp_path, cohort="auto")
    assert chooser.choose() == "vectorized"
    seen = timed(monkeypatch, 1.0, 3.0)
    assert chooser.choose(round=1) == "vectorized"
    assert not seen
    assert chooser.choose(round=0) == "loop"  # a new run


@pytest.mark.parametrize("content", ["{", "[]", '{"cohort": "vectorized", "device": "cuda"}', '{"device": "cpu"}'])
def test_a_choice_that_does_not_fit_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    timed(monkeypatch, 1.0, 3.0)
    chooser = Chooser(tmp_path, cohort="auto")
    chooser.path.write_text(content)
    assert chooser.choose(round=1) == "loop"


def test_few_clients_on_a_cpu_are_not_worth_a_trial(tmp_path: Path) -> None:
    chooser = Chooser(tmp_path, cohort="auto")
    assert chooser.choose() == "loop"
    assert not chooser.path.exists()


def _branching(outputs: Tensor, labels: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(outputs, labels)
    return loss if float(loss.detach()) >= 0 else -loss


def test_auto_falls_back_to_the_loop_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 3.0, 1.0)
    for settings, reason in (({"loss_fn": _branching}, ".item()"), ({"optimizer": "adagrad"}, "optimizer='adagrad'")):
        chooser = Chooser(tmp_path, cohort="auto", **settings)
        assert chooser.choose() == "loop"
        assert reason in json.loads(chooser.path.read_text())["reason"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_fn": _branching}, r'cohort="vectorized": RuntimeError: .*Choose cohort="auto" or "loop"'),
        ({"optimizer": "adagrad"}, r"cohort=\"vectorized\": optimizer='adagrad' is none of adam, adamw, sgd"),
    ],
)
def test_vectorized_is_refused_where_it_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chooser(tmp_path, cohort="vectorized", **settings).choose()


def test_what_is_asked_for_is_given_without_a_trial(tmp_path: Path) -> None:
    assert Chooser(tmp_path / "a", cohort="loop").choose() == "loop"
    assert Chooser(tmp_path / "b", cohort="vectorized").choose() == "vectorized"


def test_bad_examples_of_the_first_clients_are_not_the_models_fault(tmp_path: Path) -> None:
    chooser = Chooser(tmp_path, cohort="vectorized")
    load = chooser.load

    def broken(client_id: Any) -> Any:
        if client_id == 0:
            raise OSError("cannot be read")
        return load(client_id)

    chooser.load = broken  # type: ignore[method-assign]
    assert chooser.choose() == "vectorized"


def test_a_chunk_that_leaves_other_processes_idle_must_make_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 3.0, 1.8)
    chooser = Chooser(tmp_path, clients=4, cohort="auto")
    assert chooser.choose() == "vectorized"
    monkeypatch.setattr(type(chooser.trainer.accelerator), "num_processes", 2)
    assert chooser.choose() == "loop"


def test_the_kind_is_built_by_its_name(tmp_path: Path) -> None:
    place = Chooser(tmp_path).place
    assert isinstance(build_training("loop", place), InTurn)
    assert isinstance(build_training("vectorized", place), SideBySide)


def test_chunks_are_even(tmp_path: Path) -> None:
    training = build_training("vectorized", Chooser(tmp_path).place)
    assert [len(chunk) for chunk in training.chunks(range(31))] == [31]
    assert [len(chunk) for chunk in training.chunks(range(100))] == [100]
    assert [len(chunk) for chunk in training.chunks(range(300))] == [100, 100, 100]
    assert training.chunks([]) == []
    assert [one for chunk in training.chunks(range(300)) for one in chunk] == list(range(300))


def test_a_chunk_of_large_models_holds_few_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("floral_peft.federated.side_by_side.CHUNK_BYTES", 1000)
    place = Chooser(tmp_path).place
    size = sum(parameter.numel() * 4 for parameter in place.model.parameters())
    assert size * 5 > 1000
    assert [len(chunk) for chunk in build_training("vectorized", place).chunks(range(3))] == [1, 1, 1]


def test_a_trainer_measures_once_and_a_resumed_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = timed(monkeypatch, 3.0, 1.0)
    first = trainer(tmp_path, cohort="auto", rounds=1, save_steps=1)
    first.train()
    assert json.loads((tmp_path / "cohort.json").read_text())["cohort"] == "vectorized"
    seen.clear()
    trainer(tmp_path, cohort="auto", rounds=2).train(resume_from_checkpoint=True)
    assert not seen


def test_measuring_changes_nothing_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 3.0, 1.0)
    runs = [trainer(tmp_path / kind, cohort=kind, router_learning_rate=1.0) for kind in ("auto", "vectorized")]
    for run in runs:
        run.train()
    assert all(map(torch.equal, runs[0].model.state_dict().values(), runs[1].model.state_dict().values()))
    assert torch.equal(runs[0].mixtures()[1], runs[1].mixtures()[1])
