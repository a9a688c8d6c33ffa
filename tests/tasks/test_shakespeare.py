from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction

from floral_peft import FederatedDataset
from floral_peft.tasks import get_task
from floral_peft.tasks.shakespeare import (
    CODES,
    LENGTH,
    NOTHING,
    VOCABULARY,
    NextCharacter,
    encode,
    next_character_accuracy,
    next_character_loss,
    shakespeare_clients,
)


SPEECHES = [
    ("hamlet", "HAMLET", "To be, or not to be"),
    ("hamlet", "OPHELIA", "Good my lord,"),
    ("hamlet", "HAMLET", "that is the question" * 8),
    ("macbeth", "HAMLET", "Not in this play"),
    ("hamlet", "HAMLET", "The rest is silence."),
    ("macbeth", "FIRST WITCH", "When shall we three meet again"),
    ("macbeth", "FIRST WITCH", "In thunder, lightning, or in rain?"),
]
TEXT = {code: character for character, code in CODES.items()}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    columns = zip(("play", "speaker", "text"), zip(*SPEECHES, strict=True), strict=True)
    Dataset.from_dict(dict(columns)).save_to_disk(str(tmp_path))
    return str(tmp_path)


def spoken(clients: FederatedDataset, client: str, split: str) -> str:
    """A client's text of a split, read from its windows."""
    rows = clients[client][split][:]
    first = TEXT[int(rows["inputs"][0, 0])]
    return first + "".join(TEXT[code] for code in rows["labels"].flatten().tolist() if code != NOTHING)


def test_a_client_is_a_role_of_a_play_that_speaks_twice(folder: str) -> None:
    assert list(shakespeare_clients(0, folder)) == ["hamlet: HAMLET", "macbeth: FIRST WITCH"]


def test_a_role_s_speeches_are_for_training_or_for_testing_and_none_is_lost(folder: str) -> None:
    clients = shakespeare_clients(0, folder)
    parts = [spoken(clients, "hamlet: HAMLET", split).split("\n") for split in ("train", "test")]
    assert [len(part) for part in parts] == [2, 1]
    assert sorted(parts[0] + parts[1]) == sorted(
        text for _, name, text in SPEECHES if name == "HAMLET" and "Not" not in text
    )


def test_other_seeds_test_on_other_speeches(folder: str) -> None:
    tested = {spoken(shakespeare_clients(seed, folder), "hamlet: HAMLET", "test") for seed in range(8)}
    assert len(tested) > 1
    again = {spoken(shakespeare_clients(seed, folder), "hamlet: HAMLET", "test") for seed in range(8)}
    assert again == tested


@pytest.mark.parametrize("length", [1, 2, LENGTH, LENGTH + 1, LENGTH + 2, 3 * LENGTH])
def test_every_character_but_the_first_is_foretold_once(length: int) -> None:
    text = "".join(chr(97 + index % 26) for index in range(length))
    windows = encode(text)
    assert windows.shape[1] == LENGTH + 1
    assert (windows[1:, 0] == windows[:-1, -1]).all()
    assert [TEXT[code] for code in windows[:, 1:].flatten().tolist() if code > 0] == list(text[1:])


def test_an_unknown_character_has_a_code_of_its_own() -> None:
    assert encode("aé")[0, :2].tolist() == [CODES["a"], 0]


def test_leaf_s_windows_are_taken_where_they_do_not_overlap(tmp_path: Path) -> None:
    text = "".join(chr(33 + index % 90) for index in range(4 * LENGTH))
    rows = [(name, text[start : start + LENGTH], text[start + LENGTH]) for name in "ab" for start in range(3 * LENGTH)]
    columns = zip(("character_id", "x", "y"), zip(*rows, strict=True), strict=True)
    Dataset.from_dict(dict(columns)).save_to_disk(str(tmp_path))
    clients = shakespeare_clients(0, str(tmp_path))
    assert list(clients) == ["a", "b"]
    pieces = [piece for split in ("train", "test") for piece in spoken(clients, "b", split).split("\n")]
    assert sorted(pieces) == sorted(text[start : start + LENGTH] for start in (0, LENGTH, 2 * LENGTH))


def test_a_text_without_roles_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["To be"]}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"no column of roles: expected 'speaker', found \['text'\]"):
        shakespeare_clients(0, str(tmp_path))


def test_roles_that_speak_once_leave_nobody(tmp_path: Path) -> None:
    Dataset.from_dict({"speaker": ["A", "B"], "text": ["x", "y"]}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match="no role has two speeches"):
        shakespeare_clients(0, str(tmp_path))


def test_the_model_foretells_every_character_and_padding_counts_nowhere() -> None:
    codes = torch.tensor(encode("To be, or not"))
    logits = NextCharacter()(codes[:, :-1].clamp(min=0))
    assert logits.shape == (1, LENGTH, VOCABULARY)
    labels = torch.where(codes[:, 1:] < 0, NOTHING, codes[:, 1:])
    there = labels[0] != NOTHING
    expected = torch.nn.functional.cross_entropy(logits[0, there], labels[0, there])
    torch.testing.assert_close(next_character_loss(logits, labels), expected)
    perfect = np.eye(VOCABULARY)[labels.clamp(min=0).numpy()]
    perfect[0, 0] = np.eye(VOCABULARY)[0]  # but for the first of 12
    metrics = next_character_accuracy(EvalPrediction(predictions=perfect, label_ids=labels.numpy()))
    assert metrics["accuracy"] == pytest.approx(11 / 12)


def test_the_task_measures_characters() -> None:
    assert get_task("shakespeare").compute_metrics is next_character_accuracy
