from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from floral_peft import FederatedDataset, FloralConfig
from floral_peft.federated import get_method
from floral_peft.tasks import Task, as_task, get_task, register_task, task_names
from floral_peft.tasks.digits import digits_clients, rotate, shift_labels
from floral_peft.tasks.task import _TASKS


def examples(clients: FederatedDataset, client: int) -> tuple[Tensor, Tensor]:
    """All of a client's images [n, 8, 8] and labels [n]."""
    splits = [clients[client][name].with_format("torch")[:] for name in ("train", "test")]
    images = torch.cat([split["inputs"] for split in splits]).unflatten(1, (8, 8))
    return images, torch.cat([split["labels"] for split in splits])


def base_tensors(model: nn.Module) -> list[Tensor]:
    """The base model's parameters, whatever was put round them."""
    return [value for name, value in model.named_parameters() if "floral" not in name and "router" not in name]


def test_a_quarter_turn_turns_left_and_keeps_the_label() -> None:
    image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    turned, labels = rotate(image, torch.tensor([7]), 1)
    assert turned.tolist() == [[[2.0, 4.0], [1.0, 3.0]]]
    assert labels.tolist() == [7]


def test_shifted_labels_wrap_round_and_keep_the_image() -> None:
    image = torch.rand(2, 8, 8)
    same, labels = shift_labels(image, torch.tensor([1, 8]), 3)
    assert torch.equal(same, image)
    assert labels.tolist() == [4, 1]


def test_every_digit_goes_to_one_client_turned_as_its_cluster_says() -> None:
    clients = digits_clients(seed=3)
    assert clients.clusters == {client: client % 4 for client in range(20)}
    dealt = []
    for client in clients:
        images, labels = examples(clients, int(client))
        upright = torch.rot90(images, -(int(client) % 4), dims=(1, 2)) * 16
        dealt += [(*image, label) for image, label in zip(upright.flatten(1).tolist(), labels.tolist(), strict=True)]
    digits = load_digits()
    assert sorted(dealt) == sorted(
        (*map(float, image), int(y)) for image, y in zip(digits.data, digits.target, strict=True)
    )


def test_every_client_has_examples_to_train_and_to_test_on() -> None:
    clients = digits_clients(seed=0)
    sizes = {(len(splits["train"]), len(splits["test"])) for splits in clients.values()}
    assert all(train >= 40 and test >= 15 for train, test in sizes)


def test_the_same_seed_deals_the_same_clients_and_another_seed_others() -> None:
    first, again, other = (examples(digits_clients(seed), 5)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_method_starts_from_the_same_base_weights() -> None:
    task = get_task("digits")
    config = FloralConfig(num_adaptors=3, r=2, target_modules=["hidden"], train_base=True)
    plain, adapted, other = (
        base_tensors(task.model_for(get_method(method), config, seed))
        for method, seed in (("fedavg", 4), ("floral", 4), ("fedavg", 5))
    )
    assert len(plain) == len(adapted) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, adapted, strict=True))
    assert not torch.equal(plain[0], other[0])


def test_building_a_model_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    get_task("digits").model_for(get_method("fedavg"), FloralConfig(), seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_an_unknown_task_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match="no task 'digit': did you mean 'digits'"):
        get_task("digit")


def test_a_task_s_name_cannot_be_taken_twice() -> None:
    assert task_names()[0] == "digits"
    with pytest.raises(ValueError, match="'digits' already"):
        register_task(get_task("digits"))


def test_a_task_s_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task 'mine'.*'ruonds'.*did you mean 'rounds'"):
        Task("mine", "", clients=digits_clients, model=lambda: nn.Linear(1, 1), settings={"ruonds": 3})


@pytest.fixture
def registry() -> Iterator[None]:
    """Afterwards the known tasks are those of before."""
    before = dict(_TASKS)
    yield
    _TASKS.clear()
    _TASKS.update(before)


OWN = """
from torch import nn
from floral_peft.tasks import as_task
from floral_peft.tasks.digits import digits_clients

@as_task(model=lambda: nn.Linear(64, 10), settings={"rounds": 3})
def upside_down(seed):
    \"""Digits on their heads.

    And more to say.
    \"""
    return digits_clients(seed)

number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: None) -> str:
    """The name of a module with a task of its own in the working directory."""
    (tmp_path / "own_tasks_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_tasks_of_mine", raising=False)
    return "own_tasks_of_mine"


def test_a_task_of_one_s_own_is_a_decorated_function_at_a_dotted_path(own_module: str) -> None:
    mine = get_task(f"{own_module}:upside_down")
    assert (mine.name, mine.summary, mine.settings) == ("upside-down", "Digits on their heads", {"rounds": 3})
    assert len(mine.clients(0)) == 20
    assert get_task("upside-down") is mine


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("own_tasks_of_mine:upsidedown", "'upsidedown' does not exist: did you mean 'upside_down'"),
        ("own_tasks_of_mine:number", "'number' is of type int, not a Task"),
        ("no_such_module:it", "'no_such_module' cannot be imported (ModuleNotFoundError"),
        (":it", "cannot be imported"),
    ],
)
def test_a_dotted_path_without_a_task_is_told_what_is_there(own_module: str, path: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        get_task(path)


def test_a_decorated_task_may_say_its_name_and_cannot_take_another_s(registry: None) -> None:
    mine = as_task("mine", model=lambda: nn.Linear(1, 1), summary="all mine", threads=2)(digits_clients)
    assert (mine.name, mine.summary, mine.threads) == ("mine", "all mine", 2)
    with pytest.raises(ValueError, match="'mine' already"):
        as_task("mine", model=lambda: nn.Linear(1, 1))(digits_clients)


def test_a_task_s_dataset_is_its_own_choice_or_the_user_s() -> None:
    asked: list[tuple[int, str]] = []

    def clients(seed: int, data: str) -> FederatedDataset:
        asked.append((seed, data))
        return digits_clients(seed)

    task = Task("mine", "", clients, lambda: nn.Linear(1, 1), data="me/mine")
    task.with_data(None).clients(3)
    task.with_data("folder").clients(4)
    assert asked == [(3, "me/mine"), (4, "folder")]


def test_a_task_that_brings_its_examples_along_takes_no_data() -> None:
    digits = get_task("digits")
    assert digits.with_data(None) is digits
    with pytest.raises(ValueError, match=r"task 'digits' brings its examples along: leave data='mnist' out"):
        digits.with_data("mnist")
