"""Small datasets in folders, in place of those that tasks are made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture


def save_images(
    folder: Path,
    shape: tuple[int, ...],
    train: int,
    test: int,
    column: str = "image",
    label: str = "label",
    classes: int = 10,
) -> np.ndarray:
    """Random images and labels 0, 1, ..., classes − 1, 0, ... as `DatasetDict.save_to_disk` writes them.

    Returns:
        The training images, (train, *shape), uint8.
    """
    rng = np.random.default_rng(0)
    features = Features({column: Image(), label: ClassLabel(num_classes=classes)})
    pixels = {name: rng.integers(0, 256, (n, *shape), np.uint8) for name, n in (("train", train), ("test", test))}
    splits = {
        name: Dataset.from_dict(
            {column: [Picture.fromarray(image) for image in images], label: np.arange(len(images)) % classes},
            features=features,
        )
        for name, images in pixels.items()
    }
    DatasetDict(splits).save_to_disk(str(folder))
    return pixels["train"]
