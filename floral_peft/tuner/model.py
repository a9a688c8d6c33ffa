"""FloralModel: puts adapted layers into a model, and holds the router that they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from typing_extensions import override

from floral_peft.tuner.clients import Clients
from floral_peft.tuner.config import REPARAMETRIZED
from floral_peft.tuner.layers import BatchNorm, FloralLayer, Norm, is_norm, layer_class
from floral_peft.tuner.router import Router, RouterSettings
from floral_peft.tuner.shrinking import Shrinking
from floral_peft.tuner.targets import TARGET_MODULES
from floral_peft.tuner.tied import sharing_layers


class FloralModel(Clients, Shrinking, BaseTuner):
    """A model whose target layers have C adaptors, mixed by a router per client (FLoRAL, CPAL 2025).

    Made by `get_peft_model(model, FloralConfig(...))`; the methods below can be called on the PeftModel.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`FloralConfig`]): The adapter's configuration.
        adapter_name (`str`): The adapter's name, `"default"` by default.

    **Attributes**:
        - **model** (`torch.nn.Module`): the adapted model.
        - **router** ([`Router`]): logits of all adapters and clients, and the current client.
    """

    peft_config: dict[str, Any]  # adapter name -> FloralConfig
    uses_shared_state = True
    prefix = "floral_"
    tuner_layer_cls = FloralLayer
    target_module_mapping: Any = TARGET_MODULES

    # Injection

    @override
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if "floral_router" not in self._modules:
            # PEFT knows adapter parameters by the method's prefix in their names
            self.floral_router = Router()
            self._hooks = [
                model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                model.register_forward_hook(self._after_forward, always_call=True),
            ]
            if isinstance(head := getattr(model, "get_output_embeddings", lambda: None)(), nn.Linear):
                self._hooks.append(head.register_forward_pre_hook(_in_one_piece))
        self._next_slot = 0
        trains = {name: table.requires_grad for name, table in self.router.logits.items()}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for name, requires_grad in trains.items():  # as PEFT does for what it can see: a new adapter changes no other
            self.router.logits[name].requires_grad_(requires_grad)
        # kept, because a walk through a large model takes as long as several of its layers
        self._adapted = [module for module in self.model.modules() if isinstance(module, FloralLayer)]
        config = self.peft_config[adapter_name]
        weight = self._adapted[0].get_base_layer().weight
        device, dtype = weight.device, weight.dtype if weight.is_floating_point() else torch.float32
        if device.type == "meta":  # a base that is loaded later; the router is small and has its values now
            device = torch.device("cpu")
        self.router.add_adapter(adapter_name, RouterSettings.of(config), self._next_slot, device, dtype)
        active = adapter_name in self.active_adapters
        self.router.set_active(self.active_adapters)
        self.router.set_requires_grad([adapter_name], active and not config.inference_mode)

    @override
    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Look at all target layers before any is replaced, so that a refusal leaves the model as it was."""
        targets = getattr(peft_config, "target_modules", None)
        self._norms = {name for name, module in model.named_modules() if isinstance(module, Norm) or is_norm(module)}
        self._batch_norms = _in_one_place(
            model, lambda module: isinstance(module, BatchNorm) or BatchNorm.fits(module)
        )
        inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for name, module in model.named_modules():
            if not name or name.startswith(tuple(inside)) or isinstance(module, BaseTunerLayer):
                continue
            if targets != "all-linear" and self._check_target_module_exists(peft_config, name):
                self._layer_class(module, name, self._backend(module), peft_config)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        """PEFT's rules for names, and norms that they do not exclude.

        With `adapt_norms` these are all, with `train_base` those whose adaptors have statistics of their own.
        """
        match = check_target_module_exists(peft_config, key)
        if match or isinstance(match, _ExcludedModule):
            return match
        return key in (self._norms if peft_config.adapt_norms else self._batch_norms if peft_config.train_base else ())

    def _backend(self, module: nn.Module) -> QuantizationBackend | None:
        return resolve_quantization_backend(module, **get_quantization_kwargs(self.model))

    @staticmethod
    def _layer_class(
        module: nn.Module, name: str, backend: QuantizationBackend | None, config: Any
    ) -> type[FloralLayer]:
        try:
            reparametrize = config.adapt_norms == REPARAMETRIZED
            return layer_class(module, backend, reparametrize=reparametrize, trains=config.train_base)
        except TypeError as error:
            raise ValueError(
                f"Target module {name!r} ({type(module).__name__}) is not supported: {error}. "
                "Name other layers in `target_modules`, or this one in `exclude_modules`."
            ) from None

    @override
    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks, scales = peft_config.rank_pattern, peft_config.alpha_pattern
        options: dict[str, Any] = {
            "rank": ranks.get(get_pattern_key(list(ranks), current_key)),
            "scale": scales.get(get_pattern_key(list(scales), current_key), peft_config.alpha),
            "slot": self._next_slot if peft_config.router_per_layer else 0,
        }
        self._next_slot += 1
        if isinstance(target, FloralLayer):
            target.update_layer(adapter_name, peft_config, **options)
            return
        backend = self._backend(target)
        layer = self._layer_class(target, current_key, backend, peft_config)(target, self.router, current_key)
        layer.quantization_backend = backend
        if isinstance(parent, nn.TransformerEncoderLayer):
            layer.register_forward_pre_hook(_no_fast_path)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    @override
    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        training = [name for name, other in self.peft_config.items() if other.train_base]
        if training and len(self.peft_config) > 1:
            raise ValueError(
                f"Adapter {training[0]!r} trains the base model (train_base=True), so it cannot share that base with "
                "other adapters. Use one adapter, or train_base=False for all."
            )

    def _layers(self) -> Sequence[FloralLayer]:
        return self._adapted

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """PEFT asks for this before every pass. Nothing is to be enabled; its absence would be slow to find out."""
        return nullcontext()

    @property
    @override
    def _disabled(self) -> bool:
        return any(layer.disable_adapters for layer in self._layers())

    @override
    def _check_not_merged(self, intent: str) -> None:
        if any(layer.merged for layer in self._layers()):
            raise ValueError(
                f"Cannot {intent}: one client's mixture is merged into the weights. Call `unmerge_adapter` first."
            )

    # Adapters: PEFT's own walk visits `self.model`, the router is beside it

    @override
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = self.active_adapters
        self.router.set_active(names)
        self.router.set_requires_grad(list(self.router.logits), False)
        self.router.set_requires_grad(names, not inference_mode)
        if any(self.peft_config[name].train_base for name in self.peft_config):
            train = not inference_mode and any(self.peft_config[name].train_base for name in names)
            self._set_base_requires_grad(train)

    @override
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.router.set_requires_grad(names, requires_grad)

    @override
    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.router.set_requires_grad(self.active_adapters, enabled)

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.router.delete_adapter(adapter_name)
        self.router.set_active(self.active_adapters)

    @override
    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        active = [self.peft_config[name] for name in self.active_adapters]
        if any(config.train_base and not config.inference_mode for config in active):
            self._set_base_requires_grad(True)

    def _set_base_requires_grad(self, requires_grad: bool) -> None:
        for module in self._base_modules():
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.requires_grad_(requires_grad)

    def _base_modules(self) -> Iterator[nn.Module]:
        """All modules of the base model but those that PEFT wraps and manages itself (`modules_to_save`)."""
        stack: list[nn.Module] = [self.model]
        while stack:
            module = stack.pop()
            if isinstance(module, AuxiliaryTrainingWrapper):
                continue
            if isinstance(module, FloralLayer):
                stack.append(module.base_layer)
                continue
            yield module
            stack.extend(module.children())

    @override
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            self.router.upcast(adapter_name)

    @override
    def _check_merge_allowed(self) -> None:
        """Refuse to merge into a weight that another layer uses too: that layer would change with it."""
        for name, others in sharing_layers(self.model).items():
            raise ValueError(
                f"Cannot merge: {name} is adapted and shares its weight with {', '.join(others)}, which would change "
                "too. Untie them first (for example load the model with tie_word_embeddings=False), or use the "
                "adapter unmerged."
            )
        super()._check_merge_allowed()
        self._note_unchosen("merging takes")

    @override
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model

    # Saving: with `train_base` the base's tensors are part of the adapter, under the names of the bare model

    @override
    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.train_base:
            if any(isinstance(module, FloralLayer) and module.merged for module in model.modules()):
                raise ValueError(
                    "Cannot save an adapter whose base trains: one client's mixture is merged into the weights, which "
                    "would be saved with it. Call `unmerge_adapter` first."
                )
            wrapped = _names(model, AuxiliaryTrainingWrapper)
            infixes = _names(model, FloralLayer)
            for key, value in state_dict.items():
                if key not in selected and not key.startswith(wrapped):
                    selected[_without_infix(key, infixes)] = value
        return selected

    @override
    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f".{cls.prefix}" in key:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return key  # the base's own keys hold no adapter name

    @override
    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if not config.train_base:
            return remapped
        infixes = _names(model, FloralLayer)
        return {key if cls.prefix in key else _with_infix(key, infixes): value for key, value in remapped.items()}


def _in_one_piece(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a prompt only the last states go through the head. On that slice, torch would copy a frozen head's weight."""
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in args)


def _no_fast_path(layer: nn.Module, args: Any) -> None:
    """Torch's encoder layer, in evaluation, reads its weights past any adaptor unless something in it has a hook."""


def _in_one_place(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> set[str]:
    """The names of some modules, without those that a model has under several names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if chosen(module):
            names[id(module)].append(name)
    return {found[0] for found in names.values() if len(found) == 1}


def _names(model: nn.Module, kind: type) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kind))


def _without_infix(key: str, layers: tuple[str, ...]) -> str:
    for layer in layers:
        if key.startswith(f"{layer}base_layer."):
            return layer + key.removeprefix(f"{layer}base_layer.")
    return key


def _with_infix(key: str, layers: tuple[str, ...]) -> str:
    for layer in layers:
        if key.startswith(layer) and not key.startswith(f"{layer}base_layer."):
            return f"{layer}base_layer.{key.removeprefix(layer)}"
    return key
