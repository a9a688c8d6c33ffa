from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from floral_peft.cli import main
from floral_peft.cli.errors import UsageError
from floral_peft.cli.variants import GROUPS, read_variant, read_variants
from floral_peft.federated import FederatedTrainer
from floral_peft.federated.lock import locked
from floral_peft.reports import read_run


TINY = ["--rounds", "2", "--clients_per_round", "3", "--eval_steps", "1", "--save_steps", "1", "--disable_tqdm"]
TINY += ["--cohort", "loop"]


def reproduce(out: Path, methods: str, *words: str, seeds: str = "1") -> int:
    asked = ["--tasks", "digits", "--methods", methods, "--seeds", seeds, "--out", str(out)]
    return main(["reproduce", *asked, *TINY, *words])


def accuracy(folder: Path) -> float:
    return read_run(folder).metrics["eval_accuracy"]


def fails_at(call: int, error: BaseException, only: str | None = None) -> Callable[..., Any]:
    """`FederatedTrainer.evaluate` that raises at a call, of one method only if one is named."""
    evaluate, calls = FederatedTrainer.evaluate, []

    def evaluate_or_fail(self: FederatedTrainer) -> dict[str, float]:
        if only in (None, self.method.name):
            calls.append(1)
            if len(calls) == call:
                raise error
        return evaluate(self)

    return evaluate_or_fail


def test_every_run_has_a_folder_and_the_table_has_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(tmp_path, "fedavg,floral+num_adaptors=x0.5", seeds="1-2") == 0
    printed = capsys.readouterr().out
    assert "[4/4] digits, floral+num_adaptors=x0.5, seed 2" in printed
    assert [line.split("|")[1].strip() for line in printed.splitlines() if "±" in line and "|" in line] == [
        "FedAvg",
        "FLoRAL, C × 0.5",
    ]
    for method in ("fedavg", "floral+num_adaptors=x0.5"):
        for seed in (1, 2):
            folder = tmp_path / "digits" / method / f"seed-{seed}"
            assert json.loads((folder / "result.json").read_text())["label"] == method
            assert not list(folder.glob("checkpoint-*"))
            assert not (folder / "private").exists()
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert (settings["num_adaptors"], settings["seed"]) == (4, 2)  # half of the task's 8
    assert read_run(folder).result["parameters"] > read_run(folder).result["base_parameters"] == 4810
    assert [len(row["mixture"]) for row in read_run(folder).mixtures] == [4] * 20


def test_data_for_other_tasks_do_not_hinder_one_that_brings_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "--tasks", "digits,mnist-rotate", "--data", "folder", "--list"]) == 0
    assert capsys.readouterr().out.count("new ") == 2 * 8 * 3


def test_what_is_done_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, "fedavg") == 0
    records = tmp_path / "digits" / "fedavg" / "seed-1" / "records.jsonl"
    before = records.stat().st_mtime_ns
    capsys.readouterr()
    assert reproduce(tmp_path, "fedavg") == 0
    assert "[1/1] digits, fedavg, seed 1: done" in capsys.readouterr().out
    assert records.stat().st_mtime_ns == before


def test_what_was_cut_off_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(tmp_path / "whole", "fedavg") == 0
    for call, standing in ((2, "goes on"), (1, "cut off")):  # after a checkpoint, and before there is one
        out = tmp_path / str(call)
        with monkeypatch.context() as patched:
            patched.setattr(FederatedTrainer, "evaluate", fails_at(call, KeyboardInterrupt()))
            assert reproduce(out, "fedavg") == 130
        capsys.readouterr()
        assert reproduce(out, "fedavg", "--list") == 0
        assert capsys.readouterr().out.startswith(standing)
        assert reproduce(out, "fedavg") == 0
        assert accuracy(out / "digits/fedavg/seed-1") == accuracy(tmp_path / "whole/digits/fedavg/seed-1")


def test_a_run_that_fails_is_told_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(FederatedTrainer, "evaluate", fails_at(1, RuntimeError("a broken metric"), only="floral"))
        assert reproduce(tmp_path, "floral,fedavg") == 2
    printed = capsys.readouterr()
    assert "1 of 2 runs failed: digits, floral, seed 1 (failed: RuntimeError: a broken metric" in printed.err
    assert "FedAvg" in printed.out
    error = tmp_path / "digits" / "floral" / "seed-1" / "error.txt"
    assert "Traceback" in error.read_text()
    assert reproduce(tmp_path, "floral,fedavg") == 0
    assert not error.exists()


def test_a_folder_with_another_run_is_refused_by_the_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(tmp_path, "fedavg") == 0
    assert reproduce(tmp_path, "fedavg", "--learning_rate", "0.125") == 2
    assert "learning_rate=0.4, and 0.125 is asked for" in capsys.readouterr().err
    assert reproduce(tmp_path, "fedavg", "--rounds", "3") == 2
    assert "2 rounds and no checkpoint from which 3 can be reached" in capsys.readouterr().err
    assert reproduce(tmp_path, "fedavg", "--learning_rate", "0.125", "--overwrite_output_dir") == 0


def test_a_done_run_goes_on_to_more_rounds_if_its_checkpoints_are_kept(tmp_path: Path) -> None:
    assert reproduce(tmp_path / "more", "fedavg", "--keep_checkpoints") == 0
    assert reproduce(tmp_path / "more", "fedavg", "--rounds", "3") == 0
    assert reproduce(tmp_path / "whole", "fedavg", "--rounds", "3") == 0
    assert accuracy(tmp_path / "more/digits/fedavg/seed-1") == accuracy(tmp_path / "whole/digits/fedavg/seed-1")


def test_a_done_run_does_not_pass_for_one_of_fewer_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, "fedavg", "--keep_checkpoints") == 0
    assert reproduce(tmp_path, "fedavg", "--rounds", "1") == 2
    assert "2 rounds and no checkpoint from which 1 can be reached" in capsys.readouterr().err


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "digits" / "fedavg" / ".seed-1"):
        assert reproduce(tmp_path, "fedavg") == 0
    assert "left to another process" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks", "digit"], "did you mean 'digits'?"),
        (["--methods", "flroal"], "did you mean 'floral'?"),
        (["--methods", "papper"], "did you mean 'paper'?"),
        (["--methods", "floral+bugdet=0.1"], "did you mean 'budget'?"),
        (["--methods", "floral+budget=much"], "budget"),
        (["--methods", "floral+r=4+r=8"], "gives r twice"),
        (["--methods", "floral+conv_split=x2"], "conv_split='balanced_2d' is no number"),
        (["--seed", "3"], "--seed is not for reproduce: give --seeds."),
        (["--ruonds", "3"], "did you mean 'rounds'?"),
        (["--seeds", "one"], "'one' is neither a number nor a range of them, such as 1-3"),
        (["--out", __file__], "test_reproduce.py' is a file. Choose another out."),
        (["--seeds", "3-1"], "there is no number in '3-1'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--tasks", "digits", "--methods", "fedavg", *words]) == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_variant_is_a_method_with_flags() -> None:
    variant = read_variant("floral+budget=0.01+router_learning_rate=1e+3+optimal_routing+num_adaptors=x1.5")
    flags = ["--method", "floral", "--budget", "0.01", "--router_learning_rate", "1e+3", "--optimal_routing"]
    assert variant.words() == flags
    assert variant.words({"num_adaptors": 4}) == [*flags, "--num_adaptors", "6"]


def test_a_group_stands_for_its_members_and_each_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "two", ("fedavg", "floral+budget=0.01"))
    assert [variant.label for variant in read_variants(["floral", "two", "fedavg"])] == [
        "floral",
        "fedavg",
        "floral+budget=0.01",
    ]


def test_a_setting_that_is_no_number_is_not_multiplied() -> None:
    with pytest.raises(UsageError, match="train_base=True is no number"):
        read_variant("floral+train_base=x2").words({"train_base": True})
