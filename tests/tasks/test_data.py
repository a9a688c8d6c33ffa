from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from floral_peft.tasks.data import column_of, read_images, read_splits
from tests.tasks.folders import save_images


def test_a_saved_folder_is_read_by_itself_and_from_the_folder_that_holds_it(tmp_path: Path) -> None:
    save_images(tmp_path / "mnist", (4, 4), 3, 2)
    for data in (tmp_path / "mnist", tmp_path):
        assert {name: len(split) for name, split in read_splits(str(data), "mnist").items()} == {"train": 3, "test": 2}


def test_a_lone_dataset_is_for_training(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path))
    assert read_splits(str(tmp_path), "shakespeare")["train"]["text"][:] == ["a", "b"]


def test_files_that_datasets_reads_do_as_well(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"speaker": "HAMLET", "text": "To be"}\n')
    assert read_splits(str(tmp_path), "shakespeare")["train"][0] == {"speaker": "HAMLET", "text": "To be"}


def test_a_folder_of_other_datasets_tells_which_it_has(tmp_path: Path) -> None:
    save_images(tmp_path / "mnist", (4, 4), 2, 2)
    with pytest.raises(ValueError, match="holds mnist, but no 'cifar100'"):
        read_splits(str(tmp_path), "cifar100")


def test_a_name_that_cannot_be_read_is_told_with_what_could_be_given() -> None:
    with pytest.raises(ValueError, match=r"data='nowhere/nothing'.*a name on the hub.*'mnist'"):
        read_splits("nowhere/nothing", "mnist")


def test_a_missing_column_is_told_with_those_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"no column of images: expected 'image' or 'img', found \['picture'\]"):
        column_of(Dataset.from_dict({"picture": [1]}), ("image", "img"), "images")


def test_images_of_two_shapes_are_refused(tmp_path: Path) -> None:
    rows = [np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)]
    with pytest.raises(ValueError, match="'image': expected images of one shape and 8 bits"):
        read_images(Dataset.from_dict({"image": rows}), "image")
