"""The next character in Shakespeare's plays, one client per role."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import EvalPrediction

from floral_peft.federated import FederatedDataset
from floral_peft.federated.partition import hold_out, test_count
from floral_peft.federated.seeding import derive_seed
from floral_peft.tasks.data import column_of, read_column, read_splits
from floral_peft.tasks.tables import as_dataset, cut
from floral_peft.tasks.task import Task, register_task


HUB = "flwrlabs/shakespeare"
LENGTH = 80
TEST_SHARE = 0.2

#: Character → code from 1; any other is 0.
CODES = {character: code for code, character in enumerate(["\n", *map(chr, range(32, 127))], start=1)}
VOCABULARY = len(CODES) + 1
#: The label of what is not there, which the loss and the accuracy leave out.
NOTHING = -100


def shakespeare_clients(seed: int, data: str) -> FederatedDataset:
    """One client for each role of each play that has at least two speeches, a fifth of which are held out for testing.

    Args:
        seed: Decides which speeches are for testing.
        data: Where the dataset is, see [`read_splits`]. Its rows are speeches, with columns `speaker`, `text` and, if
            roles of several plays may have the same name, `play`; or they are LEAF's windows, each moved on by one
            character, with columns `character_id`, `x` and `y`.

    Returns:
        Clients with `inputs`, codes of 80 characters, and `labels`, the codes of those that follow each of them.
    """
    roles = _roles(read_splits(data, "shakespeare")["train"])
    names = [name for name, speeches in roles.items() if len(speeches) > 1]
    if not names:
        raise ValueError(f"data={data!r}: no role has two speeches, one to train and one to test on.")
    windows: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name in names:
        rows = np.arange(len(roles[name]))
        rng = np.random.default_rng(derive_seed(seed, "shakespeare", name))
        for split, chosen in hold_out(rows, max(1, test_count(len(rows), TEST_SHARE)), rng).items():
            windows[split].append(encode("\n".join(roles[name][row] for row in chosen)))
    parts = {}
    for split, found in windows.items():
        codes = np.concatenate(found)
        labels = np.where(codes[:, 1:] < 0, NOTHING, codes[:, 1:])
        dataset = as_dataset({"inputs": codes[:, :-1].clip(min=0), "labels": labels})
        parts[split] = cut(dataset, [len(one) for one in found])
    pairs = zip(parts["train"], parts["test"], strict=True)
    return FederatedDataset(
        {name: DatasetDict(train=train, test=test) for name, (train, test) in zip(names, pairs, strict=True)}
    )


def encode(text: str) -> np.ndarray:
    """A text as windows of 81 characters' codes, int64; each begins with the last of the one before, and −1 fills up.

    So every character but the first is to be foretold once.
    """
    codes = np.array([CODES.get(character, 0) for character in text], np.int64)
    count = max(1, -(-(len(codes) - 1) // LENGTH))
    padded = np.full(count * LENGTH + 1, -1, np.int64)
    padded[: len(codes)] = codes
    return np.lib.stride_tricks.sliding_window_view(padded, LENGTH + 1)[::LENGTH]


def _roles(dataset: Dataset) -> dict[str, list[str]]:
    """Role → its speeches, in the dataset's order."""
    roles: dict[str, list[str]] = {}
    for name, text in _windows(dataset) if "character_id" in dataset.column_names else _speeches(dataset):
        if text:
            roles.setdefault(name, []).append(text)
    return roles


def _speeches(dataset: Dataset) -> Iterable[tuple[str, str]]:
    speakers = dataset[:][column_of(dataset, ("speaker",), "roles")]
    texts = dataset[:][column_of(dataset, ("text",), "speeches")]
    if "play" in dataset.column_names:
        speakers = [f"{play}: {name}" for play, name in zip(dataset[:]["play"], speakers, strict=True)]
    return zip(speakers, texts, strict=True)


def _windows(dataset: Dataset) -> Iterable[tuple[str, str]]:
    """Of LEAF's windows of 80 characters, each of which is its role's last moved on by one, every eightieth."""
    names = read_column(dataset, "character_id")
    first = np.concatenate([[True], names[1:] != names[:-1]])
    rows = np.arange(len(names))
    kept = np.flatnonzero((rows - np.maximum.accumulate(np.where(first, rows, 0))) % LENGTH == 0)
    return zip(names[kept].tolist(), dataset.select(kept)[:]["x"], strict=True)


class NextCharacter(nn.Module):
    """A network of two LSTM layers of 256 units on an embedding of 8 (McMahan et al., AISTATS 2017, 1602.05629)."""

    def __init__(self, vocabulary: int = VOCABULARY, embedding: int = 8, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, inputs: Tensor) -> Tensor:
        """Codes (examples, characters) → logits (examples, characters, vocabulary)."""
        logits: Tensor = self.output(self.lstm(self.embedding(inputs))[0])
        return logits


def next_character_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, the mean over characters."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOTHING)


def next_character_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of characters that are foretold."""
    labels = np.asarray(prediction.label_ids)
    right = np.asarray(prediction.predictions).argmax(-1) == labels
    return {"accuracy": float(right[labels != NOTHING].mean())}


SETTINGS: dict[str, Any] = {
    "rounds": 1000,
    "clients_per_round": 0.02,
    "per_device_train_batch_size": 8,  # most roles have but a few windows
    "learning_rate": 4.0,  # at 1, and batches of 32, FedAvg foretold nothing but spaces for 100 rounds
    "router_learning_rate": 0.1,
    "max_grad_norm": 5.0,
    "eval_steps": 100,
    "num_adaptors": 10,
    "search_adaptors": 10,  # roles form no clear clusters
    "r": 8,
    "router_noise": 1.0,
    "target_modules": ["output"],  # so that adaptors share all layers before when clients look at each
    "train_base": True,
}

register_task(
    Task(
        name="shakespeare",
        summary="Shakespeare's plays, a client for each role with at least two speeches; which character comes next",
        clients=shakespeare_clients,
        model=NextCharacter,
        settings=SETTINGS,
        loss_fn=next_character_loss,
        compute_metrics=next_character_accuracy,
        data=HUB,
    )
)
