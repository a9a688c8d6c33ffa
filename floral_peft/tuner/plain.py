"""A model with adaptors as the plain model that it is for one client: its tensors by their own names, and on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from floral_peft.tuner.layers import FloralLayer


#: The file with a plain `nn.Module`'s tensors, where the module has no `save_pretrained`.
WEIGHTS = "model.safetensors"


def wrapped_modules(base: nn.Module) -> Iterator[tuple[str, FloralLayer | ModulesToSaveWrapper]]:
    """The modules that stand in for one of the base model's, adapted or saved whole, by the names of those."""
    for name, module in base.named_modules():
        if isinstance(module, (FloralLayer, ModulesToSaveWrapper)):
            yield name, module


@torch.no_grad()
def plain_state(base: nn.Module, *, mixed: bool = True) -> dict[str, Tensor]:
    """The tensors of a base model into which adaptors were put, by the names that it had for them before.

    Tensors that no adaptor changes are not copied.

    Args:
        base: The model inside the tuner, `model.get_base_model()`.
        mixed: Add the current client's mixtures, and take the active adapters' own modules (`modules_to_save`). False:
            what the client has in common with all others, the base alone.

    Raises:
        ValueError: A mixture cannot be added to a layer's weight, because it is quantised.
    """
    state = dict(base.state_dict())
    for name, module in wrapped_modules(base):
        if isinstance(module, FloralLayer):
            own = dict(module.get_base_layer().state_dict())
            if mixed:
                own |= _mixed_parameters(module)
        else:
            own = dict(saved_whole(module).state_dict() if mixed else module.original_module.state_dict())
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": value for key, value in own.items()}
    return state


def _mixed_parameters(layer: FloralLayer) -> dict[str, Tensor]:
    if layer.quantization_backend is not None:
        raise ValueError(
            f"Layer {layer.name} is quantised, so its weight cannot hold a client's mixture exactly: export a LoRA "
            '(kind="lora") instead.'
        )
    return layer.mixed_parameters()


def saved_whole(wrapper: ModulesToSaveWrapper) -> nn.Module:
    """The module in use in place of the base's: the active adapter's own, if it has one."""
    adapters = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[adapters[0]] if adapters else wrapper.original_module


def base_trains(model: nn.Module) -> bool:
    """Whether the base model is not the one that it was: some adapter trains it, or parts of it require gradients.

    Modules that PEFT keeps beside the base's (`modules_to_save`) are none of it.

    Args:
        model: A PEFT model with FLORAL adaptors.
    """
    if any(getattr(config, "train_base", False) for config in getattr(model, "peft_config", {}).values()):
        return True
    beside = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
    )
    return any(
        parameter.requires_grad and ".floral_" not in f".{name}" and not name.startswith(beside)
        for name, parameter in model.named_parameters()
    )


def save_plain(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a model as its library does: `save_pretrained`, or its tensors in `model.safetensors`.

    Args:
        model: One of transformers', which is then loaded by `from_pretrained`; or any other module, which is loaded by
            `module.load_state_dict(safetensors.torch.load_file(...))`.
        folder: Where to; it is made.
        state: Its tensors by name, instead of those that it holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))
        return
    tensors, written = {}, set()
    for name, tensor in (model.state_dict() if state is None else state).items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.detach().clone() if place in written else tensor.detach().contiguous()
        written.add(place)  # safetensors refuses tensors that share memory
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
