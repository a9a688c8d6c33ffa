"""One client's mixture as an adapter of PEFT's LoRA, which needs nothing of this package.

A client's adaptors are rank-one terms with fixed weights, so all of them together are one low-rank change of each
layer: B' A' = s·Σ_c π_c B_c A_c. It is factored anew, exactly, with as small a rank as it has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from floral_peft.tuner.compute import composed_kernel
from floral_peft.tuner.layers import Conv, Embedding, FloralLayer, Linear
from floral_peft.tuner.layers.factored import FactoredLayer
from floral_peft.tuner.low_rank import refactor
from floral_peft.tuner.plain import saved_whole, wrapped_modules


_PREFIX = "base_model.model."


class Lora(NamedTuple):
    """A LoRA adapter.

    Args:
        config: Its configuration.
        tensors: What PEFT reads from its file, by name.
        errors: Layer name → relative error (Frobenius norm) of its factors.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    errors: dict[str, float]


class _Change(NamedTuple):
    """A layer's change: first factor (rank, n), second (m, rank), its bias's change (m,), and the error in it."""

    first: Tensor
    second: Tensor
    bias: Tensor | None
    error: float


@torch.no_grad()
def to_lora(model: Any, rank: int | None = None) -> Lora:
    """The current client's mixture of a FLORAL model as a LoRA adapter of its base model.

    Layers that LoRA does not know (norms, transposed, grouped and dilated convolutions) are held whole, as
    `modules_to_save`. Where only some layers have a bias that adaptors change, the biases are held whole (`bias`).

    Args:
        model: A PEFT model with FLORAL adaptors whose current client is to be written.
        rank: At most this rank in every layer, the best approximation; None: the rank that each layer's change has.

    Raises:
        ValueError: A LoRA of this model would not find its modules by their names, or would have none.
    """
    base = model.get_base_model()
    changes: dict[str, _Change] = {}
    layers: dict[str, FactoredLayer] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    for name, module in wrapped_modules(base):
        if not isinstance(module, FloralLayer):
            whole[name] = dict(saved_whole(module).state_dict())
        elif not any(module.holds(adapter_name) for adapter_name in module.active_adapters):
            continue
        elif isinstance(module, FactoredLayer) and _fits(module):
            layers[name], changes[name] = module, _change(module, rank)
        else:
            whole[name] = {**module.get_base_layer().state_dict(), **module.mixed_parameters()}
    tensors = {f"{name}.{key}": value for name, state in whole.items() for key, value in state.items()}
    biases = _biases(layers, changes)
    for name, change in changes.items():
        tensors |= {f"{name}.{key}": value for key, value in _lora_tensors(layers[name], change, biases).items()}
    config = _config(model, base, layers, {name: len(change.first) for name, change in changes.items()}, whole, biases)
    named = {_PREFIX + name: value.detach().contiguous().clone() for name, value in tensors.items()}
    return Lora(config, named, {name: change.error for name, change in changes.items()})


def _fits(layer: FactoredLayer) -> bool:
    """Whether PEFT has a LoRA layer that computes the same."""
    base = layer.get_base_layer()
    if isinstance(layer, Conv):  # PEFT's passes on neither dilation nor padding mode
        plain = base.groups == 1 and base.padding_mode == "zeros" and all(step == 1 for step in base.dilation)
        return plain and type(base) in layer.exact_types
    if isinstance(layer, Embedding):  # it would renormalise the factor
        return base.max_norm is None
    return isinstance(layer, Linear)


def _change(layer: FactoredLayer, rank: int | None) -> _Change:
    rows, columns, biases = [], [], []
    for adapter_name in layer.active_adapters:
        if not layer.holds(adapter_name):
            continue
        factors, mixture = layer.factors(adapter_name), layer._one_mixture(adapter_name)
        first, second = factors.first(), factors.scaled_second(mixture.to(factors.a.device))
        if second.dim() > 2:  # LoRA's second convolution is 1×1: a term for each tap of ours
            taps = second[0].numel()
            unit = torch.eye(taps, dtype=first.dtype, device=first.device).view(taps, *second.shape[1:])
            first = composed_kernel(first, unit)
        rows.append(first.flatten(1))
        columns.append(second.flatten(1))
        if (bias := factors.mixed_bias(mixture.to(factors.a.device))) is not None:
            biases.append(bias[0])
    dtype = torch.promote_types(rows[0].dtype, torch.float32)
    first, second, error = _smallest(torch.cat(rows), torch.cat(columns, dim=1), rank, dtype)
    return _Change(first.to(dtype), second.to(dtype), torch.stack(biases).sum(0) if biases else None, error)


def _smallest(rows: Tensor, columns: Tensor, rank: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Factors of `columns @ rows` of the smallest rank that is exact in a dtype, but at least 1; or of a given one."""
    largest = min(len(rows), rows.shape[1], len(columns))
    kept = largest if rank is None else min(rank, largest)
    first, second, error = refactor(rows, columns, rows.new_ones(1, len(rows)), kept)
    sigma = second[0].square().sum(0)  # singular values are split evenly
    needed = max(1, int((sigma > 8 * torch.finfo(dtype).eps * sigma.max()).sum()))
    return first[0, :needed], second[0, :, :needed], error


def _biases(layers: dict[str, FactoredLayer], changes: dict[str, _Change]) -> str:
    """How the biases' changes are held: "none" where there are no such, in LoRA's own ("lora") or whole ("base").

    PEFT gives all LoRA layers a bias or none. Embeddings, and layers without a bias in the base, cannot have one.
    """
    if all(change.bias is None for change in changes.values()):
        return "none"
    own = all(change.bias is not None for change in changes.values())
    plain = all(layer.quantization_backend is None for layer in layers.values())
    return "lora" if own and plain else "base"


def _lora_tensors(layer: FactoredLayer, change: _Change, biases: str) -> dict[str, Tensor]:
    first, second = change.first, change.second
    if isinstance(layer, Embedding):
        return {"lora_embedding_A": first, "lora_embedding_B": second}
    if isinstance(layer, Conv):
        kernel = layer.get_base_layer().kernel_size
        first = first.view(len(first), -1, *kernel)
        second = second.view(*second.shape, *[1] * len(kernel))
    tensors = {"lora_A.weight": first, "lora_B.weight": second}
    if change.bias is not None:
        bias = layer.get_base_layer().bias
        tensors |= (
            {"lora_B.bias": change.bias.to(first.dtype)}
            if biases == "lora"
            else {"base_layer.bias": bias + change.bias.to(bias)}
        )
    return tensors


def _config(
    model: Any,
    base: nn.Module,
    layers: dict[str, FactoredLayer],
    ranks: dict[str, int],
    whole: Collection[str],
    biases: str,
) -> LoraConfig:
    if not layers:
        raise ValueError(
            "No adapted layer is of a kind that LoRA knows (linear, convolution, embedding), so none can hold the "
            'client\'s mixture: export a merged model (kind="merged").'
        )
    floral = model.active_peft_config
    inside = tuple(f"{name}." for name, _ in wrapped_modules(base))
    modules = [name for name, _ in base.named_modules() if name and not name.startswith(inside)]
    _check_whole(set(whole), set(layers), modules)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of 1: the factors hold it
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=_targets(set(layers), [name for name in modules if name not in layers]),
        modules_to_save=sorted(whole) or None,
        lora_bias=biases == "lora",
        bias="lora_only" if biases == "base" else "none",
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        task_type=floral.task_type,
        base_model_name_or_path=floral.base_model_name_or_path or getattr(base, "name_or_path", None) or None,
        revision=floral.revision,
        inference_mode=True,
    )


def _targets(names: Collection[str], others: Iterable[str]) -> list[str] | str:
    """What `target_modules` selects these names and no others: last parts, whole names, or a regular expression."""
    others = list(others)
    for chosen in ({name.rpartition(".")[2] for name in names}, set(names)):
        if not any(other in chosen or other.endswith(tuple(f".{part}" for part in chosen)) for other in others):
            return sorted(chosen)
    return "|".join(re.escape(name) for name in sorted(names))


def _check_whole(whole: set[str], layers: set[str], modules: Collection[str]) -> None:
    """PEFT finds `modules_to_save` by the ends of names; it must find the right ones, and leave the LoRA layers."""
    for name in whole:
        found = {module for module in modules if module.endswith(name)} - whole
        hidden = {layer for layer in layers if re.match(rf"(^|.*\.){name}($|\..*)", layer)}
        if found | hidden:
            raise ValueError(
                f"A LoRA would hold {name} whole (modules_to_save), but by its name PEFT would find "
                f'{sorted(found | hidden)[0]} too: export a merged model (kind="merged").'
            )
