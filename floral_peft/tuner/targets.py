"""Which layers are adapted where a config does not say: PEFT's choice for LoRA, and ours for more architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


# transformers has renamed the projections of its vision models: both names are looked for.
_ATTENTION = ["query", "value", "q_proj", "v_proj"]
_OTHERS = {
    "albert": ["query", "value"],
    "clip_text_model": ["q_proj", "v_proj"],
    "convnext": ["dwconv", "pwconv1", "pwconv2"],
    "convnextv2": ["dwconv", "pwconv1", "pwconv2"],
    "distilbert": ["q_lin", "v_lin"],
    "mobilenet_v1": ["convolution"],
    "mobilenet_v2": ["convolution"],
    "mpnet": ["q", "v"],
    "olmo2": ["q_proj", "v_proj"],
    "phi3": ["qkv_proj"],
    "regnet": ["convolution"],
    "resnet": ["convolution"],
    "smollm3": ["q_proj", "v_proj"],
    "wav2vec2": ["q_proj", "v_proj"],
    "whisper": ["q_proj", "v_proj"],
}
_VISION = (
    "beit",
    "clip_vision_model",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "siglip_vision_model",
    "swin",
    "swinv2",
    "vit",
    "vit_mae",
    "vit_msn",
)

#: `model.config.model_type` → endings of the names of the layers to adapt: queries and values of attention, as PEFT
#: has it for LoRA; all convolutions of a convolutional network.
TARGET_MODULES: Mapping[str, Sequence[str]] = {
    **{model_type: _ATTENTION for model_type in _VISION},
    **_OTHERS,
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
}
