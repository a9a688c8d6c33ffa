"""Clients with images: dealt out, changed as their cluster has them, and fewer of them where a task asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn

from floral_peft.federated import FederatedDataset
from floral_peft.federated.seeding import derive_seed
from floral_peft.federated.transforms import BatchTransform
from floral_peft.tasks.changes import Change, rotate, shift_labels, unchanged
from floral_peft.tasks.data import column_of, read_column, read_images, read_splits
from floral_peft.tasks.tables import as_dataset, cut
from floral_peft.tasks.task import Task, register_task


IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label")

#: What clients of a reduced task keep of their training examples: a twentieth, but so many at least.
KEPT = 0.05
LEAST = 10
#: What makes clusters differ in the paper's tasks: a name, the change, and what it does.
CHANGES: tuple[tuple[str, Change, str], ...] = (
    ("rotate", rotate, "sees them turned by another quarter turn"),
    ("label-shift", shift_labels, "calls the class y by the name (y + c) mod 10"),
)
#: The paper's settings of reduced tasks, where they differ.
REDUCED: dict[str, Any] = {"rounds": 1500, "router_learning_rate": 0.3, "eval_steps": 75}


@dataclass(frozen=True)
class Images:
    """One split of a dataset of images.

    Attributes:
        pixels: Shape (examples, height, width) or (examples, height, width, channels), uint8.
        labels: Shape (examples,), int64.
    """

    pixels: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> Images:
        """The images and labels of a dataset."""
        labels = read_column(dataset, column_of(dataset, LABELS, "labels")).astype(np.int64)
        return cls(read_images(dataset, column_of(dataset, IMAGES, "images")), labels)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageClients:
    """Seed and dataset → clients 0 to K − 1, client k in cluster k mod C.

    The training images are dealt out to all clients in equal shares, and so are those for testing. A cluster's images
    are changed here, once.

    Attributes:
        name: What the dataset is called, in short.
        clients: K.
        clusters: C.
        change: What makes clusters differ.
        by_label: Cluster c only has labels y with y mod C = c, in place of all.
        flat: Images become vectors.
        kept: The share of its training examples that each client keeps: the first of them, but 10 at least.
        augment: The quarter turns by which a cluster's images are turned → a transform of the training images.
    """

    name: str
    clients: int
    clusters: int
    change: Change = unchanged
    by_label: bool = False
    flat: bool = False
    kept: float = 1.0
    augment: Callable[[int], BatchTransform] | None = None

    def __call__(self, seed: int, data: str) -> FederatedDataset:
        """The clients.

        Args:
            seed: Decides who gets which image.
            data: Where the dataset is, see [`read_splits`].

        Returns:
            Clients with `inputs` in [0, 1], (channels, height, width) or as a vector, and `labels`.
        """
        splits = read_splits(data, self.name)
        missing = [name for name in ("train", "test") if name not in splits]
        if missing:
            raise ValueError(f"data={data!r}: the dataset has no split {missing[0]!r}, only {sorted(splits)}.")
        train = self._split(Images.of(splits["train"]), "train", seed)
        test = self._split(Images.of(splits["test"]), "test", seed)
        parts = {client: DatasetDict(train=train[client], test=test[client]) for client in range(self.clients)}
        return FederatedDataset(parts, clusters={client: client % self.clusters for client in parts})

    def _split(self, images: Images, split: Literal["train", "test"], seed: int) -> list[Dataset]:
        """Each client's examples of a split."""
        rng = np.random.default_rng(derive_seed(seed, self.name, split))
        pools = [np.arange(len(images))]
        if self.by_label:
            pools = [np.flatnonzero(images.labels % self.clusters == cluster) for cluster in range(self.clusters)]
        shares = deal(pools, self.clients, rng)
        if split == "train":
            shares = [share[: max(LEAST, round(self.kept * len(share)))] for share in shares]
        found: dict[int, Dataset] = {}
        for cluster in range(self.clusters):
            members = range(cluster, self.clients, self.clusters)
            held = self._cluster(images, np.concatenate([shares[client] for client in members]), cluster)
            if split == "train" and self.augment is not None:
                held = held.with_transform(self.augment(cluster if self.change is rotate else 0))
            found.update(zip(members, cut(held, [len(shares[client]) for client in members]), strict=True))
        return [found[client] for client in range(self.clients)]

    def _cluster(self, images: Images, rows: np.ndarray, cluster: int) -> Dataset:
        """Some images as a cluster has them."""
        pixels, labels = self.change(as_tensor(images.pixels[rows]), torch.from_numpy(images.labels[rows]), cluster)
        inputs = pixels.flatten(1) if self.flat else pixels
        return as_dataset({"inputs": inputs.numpy(), "labels": labels.numpy()})


def deal(pools: Sequence[np.ndarray], clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle rows and deal them out in equal shares (sizes differ by at most one).

    Args:
        pools: The rows of each pool; client k gets a share of pool k mod their number.
        clients: How many clients there are.
        rng: Source of randomness.

    Returns:
        Each client's rows.

    Raises:
        ValueError: A client would get none.
    """
    shares = []
    for index, pool in enumerate(pools):
        members = len(range(index, clients, len(pools)))
        if len(pool) < members:
            raise ValueError(f"{len(pool)} examples are too few for {members} clients.")
        shares.append(np.array_split(rng.permutation(pool), members))
    return [shares[client % len(pools)][client // len(pools)] for client in range(clients)]


def as_tensor(pixels: np.ndarray) -> Tensor:
    """Images of 8 bits as float32 in [0, 1].

    Args:
        pixels: Shape (examples, height, width, channels) or, for grey images, (examples, height, width).

    Returns:
        Shape (examples, channels, height, width).
    """
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    images = images.movedim(-1, 1) if images.dim() == 4 else images[:, None]
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def register_whole_and_reduced(
    name: str, summary: str, clients: ImageClients, examples: int, settings: Mapping[str, Any], **more: Any
) -> None:
    """Register a task of image classification, and the same with a twentieth of the training examples.

    Args:
        name: The task's name; that of the other ends in -reduced.
        summary: One line, with {} where the number of a client's training examples belongs.
        clients: The task's clients.
        examples: How many training examples each of them has.
        settings: The task's settings.
        more: More attributes of the [`Task`].
    """
    for kept, suffix, changed in ((1.0, "", {}), (KEPT, "-reduced", REDUCED)):
        register_task(
            Task(
                name=name + suffix,
                summary=summary.format(f"{round(kept * examples):,}"),
                clients=replace(clients, kept=kept),
                settings={**settings, **changed},
                loss_fn=nn.functional.cross_entropy,
                **more,
            )
        )


def register_rotated_and_shifted(name: str, title: str, clients: ImageClients, **more: Any) -> None:
    """Register four tasks: clusters differ by rotation or by their labels' names, each whole and reduced.

    Args:
        name: The dataset's name, with which the tasks' names begin.
        title: The dataset's name for readers.
        clients: The clients, without a change.
        more: More arguments of [`register_whole_and_reduced`].
    """
    for kind, change, how in CHANGES:
        held = f"{title}, {clients.clients} clients of {{}} training images"
        summary = f"{held}; each of {clients.clusters} clusters {how}"
        register_whole_and_reduced(f"{name}-{kind}", summary, replace(clients, change=change), **more)
