"""A config that names no layers adapts those that are usual for the architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoModel

from floral_peft import FloralConfig
from floral_peft.tuner import FloralLayer
from floral_peft.tuner.targets import TARGET_MODULES

from .models import KINDS, floral


OURS = sorted(set(TARGET_MODULES) - set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING))
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 16, "vocab_size": 40, "num_key_value_heads": 2, "embedding_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VERY_OWN: dict[str, dict[str, Any]] = {
    "convnext": {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2},
    "distilbert": {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 40},
    "mobilenet_v1": {},
    "mobilenet_v2": {},
    "regnet": {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    "resnet": {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 2},
    "swinv2": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 2},
    "wav2vec2": {**SMALL, "conv_dim": [4] * 7, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4},
    "whisper": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 10,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    },
}  # fmt: skip


def adapted(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FloralLayer)]


@pytest.mark.parametrize("model_type", OURS)
def test_an_architecture_that_peft_has_no_choice_for_is_adapted(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type](**VERY_OWN.get(model_type, SMALL))
    model = get_peft_model(AutoModel.from_config(config), FloralConfig(r=1, num_adaptors=2))
    assert adapted(model)


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_mobilenet_pads_by_what_it_reads_off_its_convolutions(version: str) -> None:
    config = getattr(transformers, f"MobileNet{version}Config")(image_size=32, depth_multiplier=0.35, tf_padding=True)
    plain = getattr(transformers, f"MobileNet{version}ForImageClassification")(config).eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = plain(x).logits
    model = get_peft_model(plain, FloralConfig(r=1, num_adaptors=2)).eval()
    torch.testing.assert_close(model(x).logits, wanted)


@pytest.mark.parametrize(("kind", "layers"), [("resnet", 9), ("vit", 4), ("llama", 4), ("bert", 4)])
def test_convolutions_of_a_resnet_queries_and_values_of_a_transformer(kind: str, layers: int) -> None:
    assert len(adapted(floral(kind))) == layers


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_all_linear_leaves_the_head_alone(kind: str) -> None:
    names = adapted(floral(kind, target_modules="all-linear"))
    assert len(names) >= 12
    assert not any(name.endswith(("lm_head", "classifier")) for name in names)


@pytest.mark.parametrize(
    ("more", "left_alone"),
    [
        ({}, False),
        ({"modules_to_save": ["classifier"]}, True),
        ({"exclude_modules": ["classifier"]}, True),
        ({"task_type": "SEQ_CLS"}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_all_linear_takes_a_head_along_as_lora_does_unless_it_is_trained_whole_or_excluded(
    kind: str, more: dict[str, Any], left_alone: bool
) -> None:
    ours = floral(kind, **{"task_type": None, "target_modules": "all-linear", **more})
    lora: Any = get_peft_model(KINDS[kind][0](), LoraConfig(target_modules="all-linear", **more))
    assert ours.targeted_module_names == lora.targeted_module_names
    assert ("classifier" in ours.targeted_module_names) is not left_alone
