from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from floral_peft.cli.errors import UsageError
from floral_peft.cli.settings import Settings, read_settings
from floral_peft.tasks import get_task


def config(folder: Path, text: str) -> str:
    file = folder / "settings.yaml"
    file.write_text(text)
    return f"--config={file}"


def targets(settings: Settings) -> Any:
    """What is adapted: PEFT keeps names as a set."""
    return settings.adaptors.target_modules


def refusal(*words: str) -> str:
    with pytest.raises((UsageError, ValueError, TypeError)) as error:
        read_settings(words)
    return str(error.value)


def test_without_arguments_floral_and_fedavg_learn_the_digits() -> None:
    settings = read_settings([])
    assert settings.task is get_task("digits")
    assert settings.methods == ["floral", "fedavg"]


def test_a_run_without_a_named_folder_gets_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/digits", "runs/digits-2", "runs/digits-3"):
        assert read_settings([]).federated.output_dir == expected
        Path(expected).mkdir(parents=True)
    assert read_settings(["--output_dir", "runs/digits"]).federated.output_dir == "runs/digits"


def test_a_resumed_run_without_a_named_folder_is_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    resumed = ["--resume_from_checkpoint", "true"]
    with pytest.raises(UsageError, match="there is no run in runs/digits; --output_dir says where it is"):
        read_settings(resumed)
    for name in ("digits", "digits-2", "digits-4"):  # the last one is not in the row
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert read_settings(resumed).federated.output_dir == "runs/digits-2"
    assert read_settings([*resumed, "--output-dir=runs/digits-3"]).federated.output_dir == "runs/digits-3"
    assert read_settings([]).federated.output_dir == "runs/digits-3"
    named = ["--resume_from_checkpoint", "runs/digits/floral/checkpoint-4"]
    assert read_settings(named).federated.output_dir == "runs/digits"


def test_the_task_s_settings_yield_to_the_file_s_and_those_to_the_flags(tmp_path: Path) -> None:
    task = get_task("digits").settings
    file = config(tmp_path, "rounds: 7\nlearning_rate: 0.25\nnum_adaptors: 6\nr: 3\n")
    settings = read_settings(["--r", "2", file, "--rounds=9"])
    assert (settings.federated.rounds, settings.adaptors.r) == (9, 2)
    assert (settings.federated.learning_rate, settings.adaptors.num_adaptors) == (0.25, 6)
    assert settings.federated.router_learning_rate == task["router_learning_rate"]


def test_a_file_may_choose_the_task_and_a_flag_another(tmp_path: Path) -> None:
    file = config(tmp_path, "task: digits-label-shift")
    assert read_settings([file]).task.name == "digits-label-shift"
    assert read_settings([file, "--task", "digits"]).task.name == "digits"


def test_a_task_is_told_where_its_data_is_and_a_run_remembers_it(tmp_path: Path) -> None:
    settings = read_settings(["--task", "mnist-rotate", "--data", "folder"])
    assert settings.task.data == "folder"
    values = settings.to_dict("floral", settings.federated)
    assert (values["task"], values["data"]) == ("mnist-rotate", "folder")
    assert read_settings([config(tmp_path, yaml.safe_dump(values))]).task.data == "folder"
    assert read_settings(["--task", "mnist-rotate"]).task.data == "ylecun/mnist"
    assert "brings its examples along" in refusal("--data", "folder")


def test_data_for_several_tasks_are_left_out_where_a_task_brings_its_own() -> None:
    asked = ["--data", "folder"]
    assert read_settings(["--task", "mnist-rotate", *asked], many_tasks=True).data == "folder"
    assert read_settings(["--task", "digits", *asked], many_tasks=True).data is None


def test_a_task_of_one_s_own_is_remembered_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings_test_task.py").write_text(
        "from floral_peft.tasks import get_task\nmine = get_task('digits')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = read_settings(["--task", "settings_test_task:mine"])
    assert settings.task is get_task("digits")
    assert settings.to_dict("floral", settings.federated)["task"] == "settings_test_task:mine"


def test_norms_are_switched_on_off_or_by_name() -> None:
    read = [
        read_settings(["--adapt_norms", word]).adaptors.adapt_norms for word in ("true", "False", "reparametrized")
    ]
    assert read == [True, False, "reparametrized"]
    assert read_settings(["--adapt_norms"]).adaptors.adapt_norms is True


def test_flags_may_be_written_with_dashes() -> None:
    assert read_settings(["--num-adaptors", "5"]).adaptors.num_adaptors == 5


def test_a_file_takes_what_flags_take(tmp_path: Path) -> None:
    text = """
    learning_rate: 1e-3
    optimizer_kwargs: {momentum: 0.9}
    target_modules: [hidden]
    rank_pattern: {hidden: 2}
    clients_per_round: 0.5
    train_base: false
    adapt_norms: reparametrized
    router_top_k: null
    disable_tqdm: true
    """
    settings = read_settings([config(tmp_path, text)])
    assert settings.federated.learning_rate == 0.001
    assert settings.federated.optimizer_kwargs == {"momentum": 0.9}
    assert settings.federated.clients_per_round == 0.5
    assert settings.federated.disable_tqdm
    assert targets(settings) == {"hidden"}
    assert settings.adaptors.rank_pattern == {"hidden": 2}
    assert not settings.adaptors.train_base
    assert settings.adaptors.adapt_norms == "reparametrized"
    assert settings.adaptors.router_top_k is None


def test_one_target_with_more_than_a_name_in_it_is_a_pattern() -> None:
    assert targets(read_settings(["--target_modules", "all-linear"])) == "all-linear"
    assert targets(read_settings(["--target_modules", "hid.*|output"])) == "hid.*|output"
    assert targets(read_settings(["--target_modules", "hidden", "output"])) == {"hidden", "output"}


@pytest.mark.parametrize(
    ("words", "methods"),
    [
        (["--method", "fedavg"], ["fedavg"]),
        (["--baselines", "none"], ["floral"]),
        (["--method", "fedavg", "--baselines", "floral"], ["fedavg", "floral"]),
    ],
)
def test_the_methods_are_the_method_and_its_baselines(words: list[str], methods: list[str]) -> None:
    assert read_settings(words).methods == methods


def test_what_a_run_writes_down_is_read_back_as_the_same_settings(tmp_path: Path) -> None:
    words = ["--rounds", "3", "--budget", "0.1", "--alpha_pattern", '{"hidden": 2.0}', "--target_modules", "hid.*"]
    before = read_settings([*words, "--method", "fedavg", "--optimizer_kwargs", '{"momentum": 0.5}'])
    after = read_settings([config(tmp_path, yaml.safe_dump(before.to_dict("fedavg", before.federated)))])

    def everything(settings: Settings) -> tuple[Any, ...]:
        return settings.task.name, settings.methods, settings.federated, settings.to_dict("fedavg", settings.federated)

    assert everything(after) == everything(before)


def test_none_takes_back_a_number_that_the_task_has_set() -> None:
    settings = read_settings(["--task", "mnist-rotate", "--budget", "none", "--r", "16", "--eval_steps", "none"])
    assert (settings.adaptors.budget, settings.adaptors.r, settings.federated.eval_steps) == (None, 16, None)
    assert "invalid int value: 'none'" in refusal("--rounds", "none")


def test_a_misspelt_flag_is_told_the_nearest() -> None:
    assert refusal("--ruonds", "3") == "there is no setting --ruonds: did you mean 'rounds'?"
    assert "did you mean 'num_adaptors'?" in refusal("--num-adapters=3")
    assert refusal("--xyzzy", "3") == "there is no setting --xyzzy."


def test_a_flag_is_not_guessed_from_its_beginning() -> None:
    assert "no setting --round:" in refusal("--round", "3")


def test_a_misspelt_key_in_a_file_is_told_the_nearest_and_the_file(tmp_path: Path) -> None:
    message = refusal(config(tmp_path, "rounds: 3\nlerning_rate: 0.1"))
    assert "settings.yaml: there is no setting 'lerning_rate': did you mean 'learning_rate'?" in message


def test_a_word_without_a_flag_is_refused() -> None:
    assert "'digits' belongs to no setting" in refusal("digits")


def test_an_unknown_task_is_told_the_nearest() -> None:
    assert "did you mean 'digits'" in refusal("--task", "digitz")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rounds", "many"], ["--rounds", "'many'"]),
        (["--rounds", "0"], ["rounds=0", "at least 1"]),
        (["--rounds"], ["--rounds", "expected one argument"]),
        (["--r", "0"], ["r=0", "at least 1"]),
        (["--threads", "0"], ["threads=0", "at least 1"]),
        (["--budget", "2"], ["budget=2.0", "(0, 1]"]),
        (["--compute", "fast"], ["--compute", "'fast'", "stacked"]),
        (["--rank_pattern", "hidden"], ["--rank_pattern", "'hidden'", "not JSON"]),
        (["--rank_pattern", "[1]"], ["--rank_pattern", "must be an object"]),
        (["--rank_pattern", '{"[": 2}'], ["rank_pattern", "'['", "regular expression"]),
        (["--target_modules", "["], ["target_modules", "'['", "regular expression"]),
        (
            ["--layers_pattern", "[", "--layers_to_transform", "0", "--target_modules", "hidden"],
            ["layers_pattern", "'['"],
        ),
        (["--adapt_norms", "maybe"], ["adapt_norms", "'maybe'", "reparametrized"]),
        (["--optimizer", "sdg"], ["optimizer='sdg'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(words: list[str], named: list[str]) -> None:
    message = refusal(*words)
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rounds: many", ["settings.yaml", "rounds", "'many'"]),
        ("rounds: 1.5", ["settings.yaml", "rounds", "'1.5'"]),
        ("rounds: [1, 2]", ["settings.yaml", "rounds", "one value"]),
        ("- rounds", ["settings.yaml", "name: value", "list"]),
        ("rounds: [", ["settings.yaml", "not YAML"]),
        ("seed: 2020-99-99", ["settings.yaml", "not YAML"]),
        ("rounds: 1\nseed: 2\nrounds: 3", ["settings.yaml", "line 3 gives 'rounds' again"]),
        ("optimizer_kwargs: {momentum: 1, momentum: 2}", ["settings.yaml", "'momentum' again"]),
        ("config: other.yaml", ["settings.yaml", "a file cannot name another one", "'config'"]),
        ("task: null", ["settings.yaml", "task must be a name, got None"]),
        ("task: [digits]", ["settings.yaml", "task must be a name, got ['digits']"]),
        ("method: null", ["settings.yaml", "method must be a name, got None"]),
        ("target_modules: '['", ["target_modules", "'['", "regular expression"]),
        ("3: 4", ["settings.yaml", "no setting 3"]),
        ("task: digitz", ["did you mean 'digits'"]),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path: Path, text: str, named: list[str]) -> None:
    message = refusal(config(tmp_path, text))
    assert all(part in message for part in named), message
