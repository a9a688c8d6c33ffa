"""Model cards: the README.md of a folder with a model, whose head the Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel


README = "README.md"


def base_name(name: str | None) -> str | None:
    """A base model's name, if it is one on the Hub; a folder's is nobody else's business, and the Hub refuses it."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def adapter_data(model: Any, tags: Sequence[str]) -> ModelCardData:
    """The metadata of an adapter, as PEFT gives it.

    Args:
        model: A PEFT model.
        tags: Tags beside PEFT's.
    """
    base, config = model.get_base_model(), model.active_peft_config
    name = base_name(config.base_model_name_or_path or getattr(base, "name_or_path", None))
    ours = [*tags, *(["transformers"] if isinstance(base, PreTrainedModel) else [])]
    return ModelCardData(
        library_name="peft",
        base_model=name,
        tags=sorted([*ours, f"base_model:adapter:{name}"] if name else ours),
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
    )


def write_card(folder: Path, data: ModelCardData, text: str) -> None:
    """Write a folder's model card, in place of one that is there.

    Args:
        folder: The folder.
        data: The metadata.
        text: The card's body, in Markdown; PEFT's version is added.
    """
    versions = f"### Framework versions\n\n- PEFT {peft.__version__}\n"
    (folder / README).write_text(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n\n{versions}", encoding="utf-8")
