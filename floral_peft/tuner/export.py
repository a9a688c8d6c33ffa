"""Write one client's model so that it can be used without this package: a plain model, or a plain LoRA adapter."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from floral_peft.tuner.card import adapter_data, write_card
from floral_peft.tuner.ensemble import Ensemble
from floral_peft.tuner.layers import FloralLayer
from floral_peft.tuner.lora import to_lora
from floral_peft.tuner.plain import WEIGHTS, base_trains, plain_state, save_plain
from floral_peft.tuner.router import Client
from floral_peft.tuner.tied import sharing_layers


ExportKind = Literal["auto", "merged", "lora"]

#: Where beside a LoRA the base lies, if it was trained.
BASE = "base_model"


class Exported(NamedTuple):
    """What was written.

    Args:
        kind: "merged" or "lora".
        errors: Of a LoRA: layer name → relative error (Frobenius norm) of its factors, 0 unless `rank` cut some off.
    """

    kind: Literal["merged", "lora"]
    errors: dict[str, float]


def export_client(
    model: nn.Module,
    folder: str | Path,
    client: Client | None = None,
    kind: ExportKind = "auto",
    rank: int | None = None,
) -> Exported:
    """Write one client's model, for use without this package.

    ```python
    export_client(model, "hamlet", client="hamlet")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "hamlet")
    ```

    Args:
        model: A PEFT model with FLORAL adaptors; or an [`Ensemble`], of which a client can have one member.
        folder: Where to; it is made.
        client: A client's name or row, by default the current one.
        kind: `"merged"`: the base model with the client's mixture in its weights, written by its own
            `save_pretrained` or, for a plain `nn.Module`, its tensors as `model.safetensors`. `"lora"`: an adapter of
            PEFT's LoRA, of rank C·r or the smaller one that the mixture has; if the base was trained, with that base
            in the folder `base_model`. `"auto"`: a LoRA where the base is what it was or a rank is given, else merged.
        rank: Cut a LoRA's layers off at this rank; None: it is exact.

    Raises:
        ValueError: No such client, a mixture is merged into the weights, or what was asked for cannot hold the
            client's model (the message names the layer and what can), or the folder holds an export of another kind.
    """
    if kind not in get_args(ExportKind):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, get_args(ExportKind)))}.")
    if rank is not None and (rank < 1 or kind == "merged"):
        raise ValueError(
            f"rank={rank}: a LoRA's rank is at least 1, or None for an exact one; a merged model has none."
        )
    if not isinstance(model, Ensemble) and not any(isinstance(module, FloralLayer) for module in model.modules()):
        raise ValueError("the model has no FLORAL adaptors, so there is no client's mixture to export.")
    held: Any = model
    if client is None:
        held._note_unchosen("the export takes")
    with nullcontext() if client is None else held.client(client):
        if isinstance(model, Ensemble):
            return _export_member(model, Path(folder), kind)
        held._check_not_merged("export a client")
        if kind == "lora" or rank is not None or (kind == "auto" and not base_trains(model)):
            return _export_lora(model, Path(folder), rank)
        return _export_merged(model, Path(folder))


def _export_merged(model: Any, folder: Path) -> Exported:
    for name, others in sharing_layers(model).items():
        raise ValueError(
            f"Layer {name} is adapted and shares its weight with {', '.join(others)}, so no weight can be right for "
            'both: export a LoRA (kind="lora"), or untie them before training.'
        )
    base = model.get_base_model()
    state = plain_state(base)
    check_free(folder, "merged")
    save_plain(base, folder, state)
    return Exported("merged", {})


def check_free(folder: Path, kind: Literal["merged", "lora"]) -> None:
    """Refuse a folder with an export of the other kind, beside which nobody could tell what to load.

    Args:
        folder: Where to export.
        kind: What.

    Raises:
        ValueError: It holds one of another kind.
    """
    for name in (CONFIG_NAME,) if kind == "merged" else (WEIGHTS, SAFE_WEIGHTS_INDEX_NAME):
        if (folder / name).exists():
            raise ValueError(
                f"{str(folder)!r} holds an export of the other kind ({name}): choose another folder, or delete it."
            )


def _export_lora(model: Any, folder: Path, rank: int | None) -> Exported:
    base, lora = model.get_base_model(), to_lora(model, rank)
    check_free(folder, "lora")
    folder.mkdir(parents=True, exist_ok=True)
    if base_trains(model):
        save_plain(base, folder / BASE, plain_state(base, mixed=False))
        lora.config.base_model_name_or_path = str(folder / BASE)
    classes = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    lora.config.save_pretrained(str(folder), auto_mapping_dict=None if lora.config.task_type else classes)
    save_file(lora.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_card(folder, adapter_data(model, ["lora"]), _lora_text(base, base_trains(model)))
    return Exported("lora", lora.errors)


def _lora_text(base: nn.Module, trained: bool) -> str:
    what = f"A LoRA adapter of {type(base).__name__}: one client's mixture of FLoRAL adaptors."
    load = f"`PeftModel.from_pretrained(base, folder)` of PEFT loads it onto {'its' if trained else 'the'} base model"
    if not trained:
        return f"{what} {load}."
    by = "`from_pretrained`" if hasattr(base, "from_pretrained") else f"`load_state_dict` of its `{WEIGHTS}`"
    return f"{what} {load}, which was trained too: load that from `{BASE}`, by {by}."


def _export_member(model: Ensemble, folder: Path, kind: ExportKind) -> Exported:
    """One of an ensemble's models, where it is the only one that the client uses."""
    mixture = model.mixture()
    used = torch.nonzero(mixture).flatten().tolist()
    if mixture.dim() > 1 or len(used) != 1 or kind == "lora":
        raise ValueError(
            f"An Ensemble mixes the outputs of {len(model.members)} models, which no single model does"
            + (": a client can be exported, merged, only if it uses one of them alone" if kind != "lora" else "")
            + ". Export a model with FLORAL adaptors instead."
        )
    check_free(folder, "merged")
    save_plain(model.members[used[0]], folder)
    return Exported("merged", {})
