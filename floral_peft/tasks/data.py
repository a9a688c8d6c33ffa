"""Reading a task's dataset: from the hub, or from a folder that was saved or downloaded before."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from floral_peft.federated.files import write_file


logger = logging.getLogger(__name__)

#: Files by which a folder shows that `save_to_disk` wrote it.
_SAVED = ("dataset_dict.json", "state.json")
_ROWS_AT_ONCE = 1000


def read_splits(data: str, name: str) -> DatasetDict:
    """The splits of a dataset.

    Args:
        data: Where it is: a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, one with files
            that `datasets.load_dataset` reads, a folder with the one or the other in it under `name`, or a name on
            the hub.
        name: What the dataset is called, in short.

    Raises:
        ValueError: There is nothing to read, or it cannot be read; the message says what was looked for.
    """
    folder = Path(data)
    if (folder / name).is_dir():
        folder = folder / name
    others = [path.name for path in folder.glob("*") if _is_saved(path)]
    if others and not _is_saved(folder):
        raise ValueError(f"data={data!r}: the folder holds {', '.join(sorted(others))}, but no {name!r}.")
    try:
        if _is_saved(folder):
            found = load_from_disk(str(folder))
        else:
            found = load_dataset(str(folder) if folder.is_dir() else data)
    except Exception as error:  # the hub's client and the readers of files have dozens of their own
        raise ValueError(
            f"data={data!r}: no dataset could be read there ({type(error).__name__}: {error}). Give a name on the "
            f"hub, a folder that datasets' save_to_disk wrote, or a folder that holds such a one as {name!r}."
        ) from error
    return DatasetDict(train=found) if isinstance(found, Dataset) else found


def _is_saved(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _SAVED)


def column_of(dataset: Dataset, names: tuple[str, ...], what: str) -> str:
    """The first of some columns that a dataset has.

    Raises:
        ValueError: It has none of them.
    """
    found = next((name for name in names if name in dataset.column_names), None)
    if found is None:
        raise ValueError(
            f"the dataset has no column of {what}: expected {' or '.join(map(repr, names))}, "
            f"found {dataset.column_names}."
        )
    return found


def read_column(dataset: Dataset, column: str) -> np.ndarray:
    """All values of a column, as an array."""
    return np.asarray(dataset.select_columns(column).with_format("numpy")[:][column])


def read_images(dataset: Dataset, column: str) -> np.ndarray:
    """All images of a column, shape (rows, height, width) or (rows, height, width, channels), uint8.

    Decoding tens of thousands of images takes a while, so they are kept beside the datasets that `datasets` caches.

    Raises:
        ValueError: They are no images of one shape and 8 bits.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE, "floral_peft", f"{dataset._fingerprint}-{column}.npy")
    try:
        return np.load(cache, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # not there, or no array
        images = _decoded(dataset, column)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        content = BytesIO()
        np.save(content, images)
        write_file(cache, content.getvalue(), durable=False)
    except OSError as error:
        logger.info("decoded images are not kept for the next time: %s", error)
    return images


def _decoded(dataset: Dataset, column: str) -> np.ndarray:
    rows = dataset.select_columns(column).with_format("numpy")
    parts = [rows[start : start + _ROWS_AT_ONCE][column] for start in range(0, len(dataset), _ROWS_AT_ONCE)]
    if len({(part.dtype, part.shape[1:]) for part in parts}) != 1 or parts[0].dtype != np.uint8:
        kinds = sorted({f"{part.dtype} {part.shape[1:]}" for part in parts})
        raise ValueError(f"column {column!r}: expected images of one shape and 8 bits, got {', '.join(kinds)}.")
    return np.concatenate(parts)
