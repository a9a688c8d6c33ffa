"""The models and clients of pretrained.py.

Layers below the lowest adapted one never change. What they make of the examples is computed once and is what clients
hold; the model is the rest of the network, with the same weights, so figures are those of the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
)

from floral_peft import FederatedDataset
from floral_peft.tasks.changes import Change
from floral_peft.tasks.data import read_splits
from floral_peft.tasks.images import Images


CLUSTERS = 4
#: Clients' training images are among so many first ones of CIFAR-10; small_vit.py learns from the others.
VIT_CLIENTS_IMAGES = 10_000
HUB = {
    "resnet50": "microsoft/resnet-50",
    "vit": "google/vit-base-patch16-224-in21k",
    "smollm2": "HuggingFaceTB/SmolLM2-135M",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "cifar10": "uoft-cs/cifar10",
    "shakespeare": "flwrlabs/shakespeare",
}


@dataclass(frozen=True)
class Size:
    """How much there is of everything.

    Attributes:
        clients: Clients, of [`CLUSTERS`] clusters in turn (roles: of none that is known).
        examples: Training examples of each.
        tests: Test examples of each.
        side: Height and width of images (a ViT has its own), and tokens of a text.
        layers: How many layers, from the top, are adapted; of ResNet-50 convolutions of its last block, 3 at most; of
            a ViT all of them are.
        assets: A folder with the models and datasets; None: from the hub.
        device: Where the frozen layers run.
    """

    clients: int
    examples: int
    tests: int
    side: int
    layers: int
    assets: Path | None = None
    device: str = "cpu"

    def place(self, name: str) -> str:
        """Where a model or dataset is."""
        return HUB[name] if self.assets is None else str(self.assets / name)


#: Images in [0, 1] → columns.
Inputs = Callable[[Size, Tensor], dict[str, np.ndarray]]


def by_cluster(parts: dict[Any, dict[str, dict[str, Any]]]) -> FederatedDataset:
    """Clients from their columns; client k is in cluster k mod [`CLUSTERS`]."""
    return FederatedDataset(
        {client: _splits(splits) for client, splits in parts.items()},
        clusters={client: number % CLUSTERS for number, client in enumerate(parts)},
    )


def _splits(splits: dict[str, dict[str, Any]]) -> DatasetDict:
    return DatasetDict({name: Dataset.from_dict(columns).with_format("torch") for name, columns in splits.items()})


# Vision


class ResNetTail(nn.Module):
    """The last convolutions of a ResNet's last block, with what follows them, and a new head.

    Args:
        resnet: The whole network.
        layers: How many convolutions, each with its norm.
        classes: Outputs of the head.
    """

    def __init__(self, resnet: Any, layers: int, classes: int) -> None:
        super().__init__()
        block = resnet.encoder.stages[-1].layers[-1]
        self.layers, self.activation, self.pooler = block.layer[-layers:], block.activation, resnet.pooler
        self.classifier = nn.Linear(resnet.config.hidden_sizes[-1], classes)

    def forward(self, inputs: Tensor, shortcut: Tensor) -> Tensor:
        hidden = self.activation(self.layers(inputs) + shortcut)
        return self.classifier(self.pooler(hidden).flatten(1))


def _resnet(size: Size) -> Any:
    return AutoModelForImageClassification.from_pretrained(size.place("resnet50")).resnet.requires_grad_(False).eval()


def resnet_tail(size: Size) -> nn.Module:
    return ResNetTail(_resnet(size), size.layers, 10)


@torch.no_grad()
def _below(size: Size, pixels: Tensor) -> dict[str, np.ndarray]:
    """What [`ResNetTail`] takes, of images (examples, 3, height, width) in [0, 1]."""
    resnet = _resnet(size).to(size.device)
    *blocks, last = [block for stage in resnet.encoder.stages for block in stage.layers]
    inputs, shortcut = [], []
    for batch in pixels.split(50):
        hidden = resnet.embedder(_normalised(size, "resnet50", batch, size.side).to(size.device))
        for block in blocks:
            hidden = block(hidden)
        shortcut.append(hidden.cpu())
        inputs.append(last.layer[: -size.layers](hidden).cpu())
    return {"inputs": torch.cat(inputs).numpy(), "shortcut": torch.cat(shortcut).numpy()}


def vit(size: Size) -> nn.Module:
    """A ViT with a new head."""
    model = AutoModelForImageClassification.from_pretrained(size.place("vit")).requires_grad_(False)
    model.classifier = nn.Linear(model.config.hidden_size, 10).requires_grad_(False)
    model.config.num_labels = 10
    return model


def _for_vit(size: Size, pixels: Tensor) -> dict[str, np.ndarray]:
    """What a ViT takes, of images (examples, 3, height, width) in [0, 1]."""
    side = AutoConfig.from_pretrained(size.place("vit")).image_size  # a ViT takes no other
    return {"pixel_values": _normalised(size, "vit", pixels, side).numpy()}


def _normalised(size: Size, name: str, pixels: Tensor, side: int) -> Tensor:
    """Images of so many pixels a side, by the model's own mean and deviation of each colour."""
    processor: Any = AutoImageProcessor.from_pretrained(size.place(name))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    if pixels.shape[-1] != side:
        pixels = nn.functional.interpolate(pixels, size=(side, side), mode="bicubic").clamp(0, 1)
    return (pixels - mean) / std


@cache
def cifar10(size: Size, seed: int, change: Change, inputs: Inputs, among: int | None = None) -> FederatedDataset:
    """Clients with photographs, changed as their cluster has them.

    Args:
        size: How many.
        seed: Decides who gets which.
        change: What makes clusters differ.
        inputs: What the model takes, of images.
        among: Training examples are among so many first ones; None: all.
    """
    splits = read_splits(size.place("cifar10"), "cifar10")
    rng = np.random.default_rng(seed)
    parts: dict[Any, dict[str, dict[str, Any]]] = {client: {} for client in range(size.clients)}
    for split, count in (("train", size.examples), ("test", size.tests)):
        images = Images.of(splits[split])
        most = among if among and split == "train" else len(images)
        for client, rows in enumerate(rng.choice(most, (size.clients, count), replace=False)):
            pixels = torch.from_numpy(images.pixels[rows]).movedim(-1, 1) / 255
            pixels, labels = change(pixels, torch.from_numpy(images.labels[rows]), client % CLUSTERS)
            parts[client][split] = {**inputs(size, pixels), "labels": labels.numpy()}
    return by_cluster(parts)


def for_resnet(change: Change) -> Callable[[Size, int], FederatedDataset]:
    """Clients whose examples are what lies below [`ResNetTail`]."""
    return lambda size, seed: cifar10(size, seed, change, _below)


def for_vit(change: Change) -> Callable[[Size, int], FederatedDataset]:
    """Clients with images that no ViT of small_vit.py has seen."""
    return lambda size, seed: cifar10(size, seed, change, _for_vit, VIT_CLIENTS_IMAGES)


# Language


def language_tail(size: Size) -> nn.Module:
    """The last layers of a causal language model. It takes what the layers below make of a text as `inputs_embeds`."""
    model = AutoModelForCausalLM.from_pretrained(size.place("smollm2"), dtype=torch.float32).requires_grad_(False)
    model.model.layers = model.model.layers[-size.layers :]
    model.config.num_hidden_layers = size.layers
    model.config.use_cache = False
    return model


@cache
@torch.no_grad()
def roles(size: Size, seed: int) -> FederatedDataset:
    """Those of Shakespeare's characters who speak most, each with blocks of tokens; the last ones are for testing."""
    speeches = read_splits(size.place("shakespeare"), "shakespeare")["train"].to_pandas()
    texts = speeches.groupby(["play", "speaker"])["text"].apply("\n\n".join)
    chosen = texts[texts.str.len().nlargest(size.clients).index]
    tokenizer = AutoTokenizer.from_pretrained(size.place("smollm2"))
    model = AutoModelForCausalLM.from_pretrained(size.place("smollm2"), dtype=torch.float32).to(size.device).model
    model.layers, model.norm = model.layers[: -size.layers], nn.Identity()
    parts = {}
    for (play, speaker), text in chosen.items():
        tokens = tokenizer(text)["input_ids"]
        blocks = torch.tensor(tokens[: len(tokens) // size.side * size.side]).view(-1, size.side)
        parts[f"{speaker.title()} ({play.replace('_', ' ')})"] = {
            split: {
                "inputs_embeds": model(held.to(size.device), use_cache=False).last_hidden_state.cpu().numpy(),
                "labels": held.numpy(),
            }
            for split, held in (("train", blocks[: -size.tests][: size.examples]), ("test", blocks[-size.tests :]))
        }
    return FederatedDataset({role: _splits(splits) for role, splits in parts.items()})


# Classification of sentences


PLAYS = 4


class SentenceTail(nn.Module):
    """The last layers of an encoder of texts, its pooling and a new head."""

    def __init__(self, bert: Any, layers: int, classes: int) -> None:
        super().__init__()
        self.layers, self.pooler = bert.encoder.layer[-layers:], bert.pooler
        self.classifier = nn.Linear(bert.config.hidden_size, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        return self.classifier(self.pooler(inputs))


def _minilm(size: Size) -> Any:
    return AutoModel.from_pretrained(size.place("minilm")).requires_grad_(False).eval()


def sentence_tail(size: Size) -> nn.Module:
    return SentenceTail(_minilm(size), size.layers, PLAYS)


@cache
@torch.no_grad()
def passages_of_plays(size: Size, seed: int) -> FederatedDataset:
    """Passages of the four plays with most speeches; cluster c calls play y by the name (y + c) mod 4."""
    speeches = read_splits(size.place("shakespeare"), "shakespeare")["train"].to_pandas()
    names = [name for name, _ in Counter(speeches["play"]).most_common(PLAYS)]
    tokenizer = AutoTokenizer.from_pretrained(size.place("minilm"))
    passages = []
    for name in names:
        text = " ".join(speeches["text"][speeches["play"] == name])
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        inner = tokens[: len(tokens) // (size.side - 2) * (size.side - 2)].view(-1, size.side - 2)
        ends = [torch.full((len(inner), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
        passages.append(torch.cat([ends[0], inner, ends[1]], dim=1))
    plays = np.repeat(np.arange(PLAYS), [len(held) for held in passages])
    per_client = size.examples + size.tests
    chosen = np.random.default_rng(seed).choice(len(plays), size.clients * per_client, replace=False)
    tokens, plays = torch.cat(passages)[chosen], plays[chosen]
    bert = _minilm(size).to(size.device)
    bert.encoder.layer = bert.encoder.layer[: -size.layers]
    inputs = torch.cat([bert(batch.to(size.device)).last_hidden_state.cpu() for batch in tokens.split(100)]).numpy()
    parts = {}
    for client, rows in enumerate(np.arange(len(plays)).reshape(size.clients, per_client)):
        parts[client] = {
            split: {"inputs": inputs[held], "labels": (plays[held] + client) % PLAYS}
            for split, held in (("train", rows[: size.examples]), ("test", rows[size.examples :]))
        }
    return by_cluster(parts)
