"""What the notebooks read, in miniature: models with random weights and a few made-up examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)


WORDS = ["[PAD]", "[BOS]", "[EOS]", *(f"word{number}" for number in range(40))]


def write_assets(folder: Path) -> None:
    """Fill a folder with `resnet50`, `cifar10`, `smollm2` and `shakespeare`."""
    rng = np.random.default_rng(0)
    settings: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 10}
    ResNetForImageClassification(ResNetConfig(**settings)).save_pretrained(folder / "resnet50")
    BitImageProcessor().save_pretrained(folder / "resnet50")
    images = [PIL.Image.fromarray(pixels) for pixels in rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)]
    split = Dataset.from_dict({"img": images, "label": rng.integers(0, 10, 40)})
    DatasetDict(train=split, test=split).save_to_disk(str(folder / "cifar10"))

    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **ids)).save_pretrained(folder / "smollm2")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, WORDS[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "smollm2")
    speeches = [
        {"play": "a_play", "speaker": f"ROLE {role}", "text": " ".join(rng.choice(WORDS[3:], 64))}
        for role in range(7)
        for _ in range(16)
    ]
    Dataset.from_list(speeches).save_to_disk(str(folder / "shakespeare"))
