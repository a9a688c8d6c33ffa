from __future__ import annotations

import json
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread

from floral_peft.cli import main
from floral_peft.cli.settings import read_settings
from floral_peft.cli.train import build_trainer
from floral_peft.federated import FederatedTrainer, ServerState
from floral_peft.federated.lock import locked
from floral_peft.federated.rounds import RoundReport


SHORT = ["--rounds", "2", "--clients_per_round", "5", "--eval_steps", "1", "--disable_tqdm"]


@pytest.fixture(scope="module")
def run_and_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two rounds of FLoRAL and FedAvg on digits, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("runs"), StringIO()
    with redirect_stdout(printed):
        assert main(["train", *SHORT, "--output_dir", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def trained(run_and_words: tuple[Path, str]) -> Path:
    return run_and_words[0]


def accuracies(run: Path) -> list[float]:
    records = map(json.loads, (run / "records.jsonl").read_text().splitlines())
    return [record["eval_accuracy"] for record in records if record["event"] == "evaluate"]


def test_training_writes_records_metrics_model_and_settings_of_every_method(trained: Path) -> None:
    for method, model in (("floral", "adapter/adapter_model.safetensors"), ("fedavg", "model/model.safetensors")):
        events = [json.loads(line)["event"] for line in (trained / method / "records.jsonl").read_text().splitlines()]
        assert events == ["round", "evaluate", "round", "evaluate"]
        clients = [json.loads(line) for line in (trained / method / "client_metrics.jsonl").read_text().splitlines()]
        assert [row["client"] for row in clients] == list(range(20))
        assert all(0 <= row["eval_accuracy"] <= 1 for row in clients)
        assert yaml.safe_load((trained / method / "settings.yaml").read_text())["method"] == method
        assert (trained / method / model).stat().st_size > 10_000


def test_training_draws_mixtures_and_curves(trained: Path) -> None:
    for picture in (trained / "floral" / "mixtures.png", trained / "accuracy.png"):
        pixels = imread(picture)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.01


def test_training_prints_the_comparison_and_where_everything_is(run_and_words: tuple[Path, str]) -> None:
    folder, printed = run_and_words
    for words in ("mean over", "worst 10 %", "gained", "lost", "adjusted Rand index"):
        assert words in printed
    paths = [line.split()[-1] for line in printed.splitlines() if str(folder) in line]
    assert len(paths) == 12
    assert all(Path(path).exists() for path in paths)


def test_a_run_s_settings_file_gives_the_same_run_again(trained: Path, tmp_path: Path) -> None:
    settings = str(trained / "floral" / "settings.yaml")
    assert main(["train", "--config", settings, "--output_dir", str(tmp_path)]) == 0
    assert accuracies(tmp_path / "floral") == accuracies(trained / "floral")
    assert not (tmp_path / "fedavg").exists()


def test_optimal_routing_leaves_a_baseline_without_router_alone(tmp_path: Path) -> None:
    settings = read_settings(["--optimal_routing", "--output_dir", str(tmp_path)])
    clients = settings.task.clients(0)
    routed = {method: build_trainer(settings, method, clients).args.optimal_routing for method in settings.methods}
    assert routed == {"floral": True, "fedavg": False}


def test_training_goes_on_from_its_checkpoints(trained: Path, tmp_path: Path) -> None:
    words = ["train", *SHORT, "--save_steps", "1", "--output_dir", str(tmp_path), "--method", "fedavg"]
    assert main([*words, "--rounds", "1"]) == 0
    assert main(words) == 2
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert accuracies(tmp_path / "fedavg")[-1] == accuracies(trained / "fedavg")[-1]


def interrupted_in(method: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command, which the user interrupts after the second round of a method."""
    end_round = FederatedTrainer._end_round

    def interrupted(self: FederatedTrainer, server: ServerState, report: RoundReport) -> None:
        end_round(self, server, report)
        if report.round == 2 and self.method.name == method:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FederatedTrainer, "_end_round", interrupted)
        assert main(words) == 130


@pytest.mark.parametrize("method", ["floral", "fedavg"])
@pytest.mark.parametrize("save_steps", ["1", "3"])  # fedavg is interrupted after or before its first checkpoint
def test_an_interrupted_training_says_how_to_go_on(
    method: str, save_steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--rounds", "3", "--clients_per_round", "5", "--disable_tqdm", "--save_steps", save_steps]
    interrupted_in(method, words, monkeypatch)
    told = capsys.readouterr().err
    if (method, save_steps) == ("floral", "3"):
        assert "interrupted, and there is no checkpoint yet to go on from: --save_steps N makes one" in told
        return
    again = shlex.split(told.partition("Go on with it: floral-peft ")[2])
    assert again == [*words, "--output_dir", "runs/digits", "--resume_from_checkpoint", "true"]
    assert main(again) == 0
    for name in ("floral", "fedavg"):
        records = (tmp_path / "runs/digits" / name / "records.jsonl").read_text().splitlines()
        rounds = [record["round"] for record in map(json.loads, records) if record["event"] == "round"]
        assert rounds == [1, 2, 3]


def test_a_done_baseline_without_checkpoints_is_not_given_up_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--rounds", "2", "--clients_per_round", "5", "--disable_tqdm", "--output_dir", str(tmp_path)]
    assert main([*words, "--save_steps", "1"]) == 0
    for checkpoint in (tmp_path / "fedavg").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = (tmp_path / "fedavg/records.jsonl").read_bytes()
    assert main([*words, "--resume_from_checkpoint", "true"]) == 2
    assert "fedavg' holds the records or the clients' state of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "fedavg/records.jsonl").read_bytes() == before


def test_a_folder_in_which_another_process_trains_is_an_error_of_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "floral"):
        assert main(["train", *SHORT, "--output_dir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "floral-peft: error: output_dir=" in told and "is in use: process" in told and "Traceback" not in told


def test_the_report_tells_what_training_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained), "--curves", str(trained / "again.png")]) == 0
    fedavg, floral = capsys.readouterr().out.splitlines()[3:5]
    assert fedavg.split()[:2] == ["fedavg", "2"]
    assert fedavg.split()[-2:] == ["–", "–"]
    assert floral.split()[:2] == ["floral", "2"]
    assert sum(map(int, floral.split()[-2:])) <= 20
    assert imread(trained / "again.png").std() > 0.01


def test_the_report_takes_a_baseline_and_a_metric(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", str(trained / "fedavg"), "--baseline", str(trained / "floral"), "--metric", "loss"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "loss" in lines[1]
    assert all(count.isdigit() for count in lines[3].split()[-2:])


def test_a_metric_that_no_run_measured_is_told_the_nearest(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained), "--metric", "acuracy"]) == 2
    assert "no run measured 'acuracy': did you mean 'accuracy'?" in capsys.readouterr().err


def test_the_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:2] == ["digits", "digits-label-shift"]


@pytest.mark.parametrize("command", ["train", "report", "tasks"])
def test_help_tells_the_settings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert f"  {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: floral-peft {command}" in capsys.readouterr().out


def test_help_tells_a_flag_once_with_the_tasks_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    assert "--learning_rate VALUE" in told and "--learning-rate" not in told
    assert "Number of rounds to train. (60)" in told


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--ruonds", "3"], "did you mean 'rounds'?"),
        (["train", "--method", "flroal"], 'Did you mean "floral"?'),
        (["train", "--baselines", "fedavgg"], 'Did you mean "fedavg"?'),
        (["train", "--task", "digit"], "did you mean 'digits'?"),
        (["train", "--rounds", "0"], "rounds=0"),
        (["train", "--target_modules", "nothing"], "nothing"),
        (["train", "--num_adaptors", "2", "--optimal_routing"], "num_adaptors"),
        (["train", "--clients_per_round", "21"], "clients_per_round=21"),
        (["report"], "RUN"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["report", "x", "--basline", "y"], "did you mean 'baseline'?"),
        (["tasks", "digits"], "'digits' belongs to no setting"),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert printed.startswith("floral-peft: error: ")
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_of_other_clients_are_not_compared(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    (strangers / "records.jsonl").write_text((trained / "floral" / "records.jsonl").read_text())
    (strangers / "client_metrics.jsonl").write_text('{"client": "hamlet", "eval_accuracy": 1.0}\n')
    assert main(["report", str(strangers), str(trained / "fedavg")]) == 2
    assert "'hamlet'" in capsys.readouterr().err


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["floral_peft", "tasks"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("floral_peft", run_name="__main__")
    assert end.value.code == 0
    assert "digits" in capsys.readouterr().out
