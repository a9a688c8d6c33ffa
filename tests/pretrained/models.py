"""Tiny transformers models with random weights, and clients with examples for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import floral_peft.methods  # noqa: F401  (registers the methods)
from floral_peft import FloralConfig
from floral_peft.federated import FederatedArguments, FederatedDataset, FederatedTrainer


VOCABULARY = 50
CLASSES = 3
_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def resnet() -> Any:
    settings: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES}
    return ResNetForImageClassification(ResNetConfig(**settings))


def vit() -> Any:
    settings: dict[str, Any] = _TRANSFORMER | {"image_size": 8, "patch_size": 4, "num_labels": CLASSES}
    return ViTForImageClassification(ViTConfig(**settings))


def llama() -> Any:
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**_TRANSFORMER, vocab_size=VOCABULARY, num_key_value_heads=2, **special))


def bert() -> Any:
    settings: dict[str, Any] = _TRANSFORMER | {"vocab_size": VOCABULARY, "num_labels": CLASSES}
    return BertForSequenceClassification(BertConfig(**settings))


def images(count: int, seed: int) -> Dataset:
    """A class is one channel's mean; what is called which differs by the seed's parity."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    pixels = rng.normal(size=(count, 3, 8, 8)).astype(np.float32)
    pixels[np.arange(count), labels] += 2
    return Dataset.from_dict({"pixel_values": pixels, "labels": (labels + seed % 2) % CLASSES}).with_format("torch")


def sentences(count: int, seed: int) -> Dataset:
    """A class is a word that stands in the sentence; what is called which differs by the seed's parity."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    words = rng.integers(10, VOCABULARY, (count, 6))
    words[:, 1:4] = labels[:, None] + 3
    return Dataset.from_dict({"input_ids": words, "labels": (labels + seed % 2) % CLASSES}).with_format("torch")


def texts(count: int, seed: int) -> Dataset:
    """Sentences of any length that count upwards or downwards, by the seed's parity. To be padded by a collator."""
    rng = np.random.default_rng(seed)
    step = 1 if seed % 2 else -1
    starts, lengths = rng.integers(15, 35, count), rng.integers(6, 10, count)
    return Dataset.from_dict(
        {"input_ids": [[int(s) + step * i for i in range(n)] for s, n in zip(starts, lengths, strict=True)]}
    )


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What `DataCollatorForLanguageModeling` does, without a tokeniser."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([[*row["input_ids"], *[0] * (length - len(row["input_ids"]))] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def clients(examples: Any, count: int = 2) -> FederatedDataset:
    return FederatedDataset(
        {f"client {k}": DatasetDict(train=examples(12, k), test=examples(6, k + 100)) for k in range(count)},
        clusters={f"client {k}": k % 2 for k in range(count)},
    )


#: Model, its examples, the task's name in PEFT, and a collator where examples are of different lengths.
KINDS: dict[str, tuple[Any, Any, str | None, Any]] = {
    "resnet": (resnet, images, None, None),
    "vit": (vit, images, None, None),
    "llama": (llama, texts, "CAUSAL_LM", pad),
    "bert": (bert, sentences, "SEQ_CLS", None),
}


def floral(kind: str, **config: Any) -> Any:
    make, _, task, _ = KINDS[kind]
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_adaptors": 2, "r": 2, "init_std": 0.1, "task_type": task} | config
    return peft.get_peft_model(make(), FloralConfig(**settings))


def trainer(folder: Path, kind: str, model: Any, method: str = "floral", **settings: Any) -> FederatedTrainer:
    _, examples, _, collator = KINDS[kind]
    defaults: dict[str, Any] = {
        "rounds": 2, "cohort": "loop", "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True,
        "router_update": "gradient",  # a search for clusters takes more rounds than these
    }  # fmt: skip
    args = FederatedArguments(output_dir=str(folder), **(defaults | settings))
    return FederatedTrainer(model, args, clients(examples), method=method, data_collator=collator)
