"""FloralConfig: what a FLORAL adapter looks like, checked field by field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from floral_peft.tuner.registration import peft_type


CONV_SPLITS = ("balanced_2d", "balanced", "in", "out", "linear")
REPARAMETRIZED = "reparametrized"
COMPUTE_PATHS = ("auto", "stacked", "merged")


@dataclass
class FloralConfig(PeftConfig):
    """Configuration of a [`FloralModel`]: C low-rank adaptors in every target layer, mixed by a router per client.

    A target layer computes `W x + b + s · Σ_c π_c (B_c A_c x + β_c)`, π = softmax(θ) with the client's own θ (FLoRAL,
    Almansoori et al., CPAL 2025).

    Args:
        num_adaptors (`int`):
            C, the number of adaptors that clients mix. With C = 1 the router has nothing to choose and is frozen.
        r (`int`):
            Rank of every adaptor. Ignored where `budget` is given.
        budget (`float`, *optional*):
            ρ in (0, 1]: the parameters of *one* adaptor relative to its layer's; each layer gets the largest rank
            that fits.
        min_rank (`int`):
            The rank never falls below this, whatever the budget says.
        alpha (`float`):
            s, a plain factor of the mixture (not divided by the rank).
        target_modules (`list[str]` or `str`, *optional*):
            Names (or their endings) of the layers to adapt, a regular expression, or `"all-linear"`: by PEFT's rule
            all but a language model's head and what `modules_to_save` names. `None`, for transformers' models: PEFT's
            choice for LoRA, or one of the same kind where PEFT has none (`targets.py`): queries and values of
            attention, all convolutions of a ResNet.
        exclude_modules (`list[str]` or `str`, *optional*):
            Layers to leave alone, by the same rules.
        modules_to_save (`list[str]`, *optional*):
            Further modules that are trained and saved whole, such as a new classification head.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Adapt only these layer indexes. Needs `target_modules` to be a list.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers, if `layers_to_transform` cannot find it.
        rank_pattern (`dict`):
            Layer name or regular expression → rank, overriding `r` and `budget` there.
        alpha_pattern (`dict`):
            Layer name or regular expression → scale, overriding `alpha` there.
        conv_split (`str`):
            How a convolution's kernel is divided between the two factors: `"balanced_2d"`, `"balanced"`, `"in"`,
            `"out"` or `"linear"`.
        adapt_bias (`bool`):
            Give every adaptor an extra bias of its own, in layers that have a bias.
        adapt_norms (`bool` or `str`):
            Adapt all normalisation layers too (BatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm) with an extra
            scale and shift per adaptor, except where `exclude_modules` says otherwise. `"reparametrized"`: those of a
            BatchNorm are told relative to statistics of the adaptor, which are private to a client, as in the paper.
        num_clients (`int`, *optional*):
            `None`: one router vector. K: a table with a router per client, for batches that mix clients.
        client_names (`list[str | int]`, *optional*):
            Names of the K clients, in the table's order, so that `model.client("hamlet")` works.
        router_temperature (`float`):
            π = softmax(θ / temperature).
        router_noise (`float`):
            While training, uniform noise in [0, 1) times this number is added to the logits, once per forward pass.
        router_top_k (`int`, *optional*):
            Mix only the k adaptors with the largest logits.
        router_per_layer (`bool`):
            Every target layer has a router of its own.
        shared_r (`int`):
            Rank of one more adaptor that every client uses with weight 1: what clients have in common when the base
            is frozen. 0: none.
        train_base (`bool`):
            Train the base model too, as the paper does. It is then saved with the adapter. In a BatchNorm each adaptor
            has running statistics of its own, except where `exclude_modules` says otherwise.
        compute (`str`):
            `"stacked"`: two matrix products through all C·r rank-one terms; `"merged"`: add the client's mixture to
            the weight, then one product (one client per batch, plain layers only; falls back to stacked elsewhere);
            `"auto"`: whichever is cheaper for the layer and the batch.
        init_weights (`bool`):
            `True`: the adaptors start as the identity. `False`: random factors.
        init_std (`float`):
            Above 0, the factor that else starts at zero is normal with this standard deviation: pure models that
            differ give the router something to choose from.
        init_bias (`float`):
            Above 0, the extra biases of adapt_bias start uniform in ± this / √r (a convolution: r times the second
            factor's kernel) rather than at zero, and adaptors no longer as the identity. 1 is what the authors' code
            does. (Those of adapt_norms start at zero all the same; where a run begins with a search, copies of an
            adaptor start with its biases.)
    """

    num_adaptors: int = field(default=4, metadata={"help": "C, the number of adaptors that clients mix."})
    r: int = field(default=8, metadata={"help": "Rank of every adaptor; ignored where `budget` is given."})
    budget: float | None = field(
        default=None,
        metadata={"help": "Parameters of one adaptor relative to its layer's, in (0, 1]: the rank per layer follows."},
    )
    min_rank: int = field(default=1, metadata={"help": "Smallest rank a budget may lead to."})
    alpha: float = field(default=1.0, metadata={"help": "Plain factor of the mixture of adaptors."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to adapt: names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave alone: names or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved whole."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only these layer indexes."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, used with `layers_to_transform`."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Layer name or regular expression -> rank."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Layer name or regular expression -> scale."}
    )
    conv_split: str = field(
        default="balanced_2d", metadata={"help": "Split of a convolution's kernel.", "choices": CONV_SPLITS}
    )
    adapt_bias: bool = field(default=True, metadata={"help": "Extra bias per adaptor, where the layer has a bias."})
    adapt_norms: bool | str = field(
        default=False,
        metadata={"help": "Extra scale and shift per adaptor in all norms: False, True or 'reparametrized'."},
    )
    num_clients: int | None = field(
        default=None, metadata={"help": "Rows of the router's table; None: one router vector."}
    )
    client_names: list[str | int] | None = field(default=None, metadata={"help": "Names of the router table's rows."})
    router_temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of the router."})
    router_noise: float = field(
        default=0.0, metadata={"help": "Uniform training noise on the router's logits, times this number."}
    )
    router_top_k: int | None = field(default=None, metadata={"help": "Mix only the k best adaptors."})
    router_per_layer: bool = field(default=False, metadata={"help": "A router for every target layer."})
    shared_r: int = field(default=0, metadata={"help": "Rank of an adaptor that every client uses with weight 1."})
    train_base: bool = field(default=False, metadata={"help": "Train (and save) the base model too."})
    compute: str = field(default="auto", metadata={"help": "How mixtures are computed.", "choices": COMPUTE_PATHS})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity; False: random factors."})
    init_std: float = field(
        default=0.0, metadata={"help": "Standard deviation of the factor that else starts at zero."}
    )
    init_bias: float = field(
        default=0.0, metadata={"help": "Adaptors' biases start uniform in ± this / √r; 1: as in the authors' code."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.target_modules = _as_set("target_modules", self.target_modules)
        self.exclude_modules = _as_set("exclude_modules", self.exclude_modules)
        self._validate()

    def _validate(self) -> None:
        for name in ("num_adaptors", "r", "min_rank"):
            self._require(name, _is_int(1), "an integer of at least 1")
        for name in ("num_clients", "router_top_k"):
            self._require(name, lambda v: v is None or _is_int(1)(v), "None or an integer of at least 1")
        self._require("shared_r", _is_int(0), "0 (none) or a positive integer")
        self._require("budget", lambda v: v is None or (_is_number(v) and 0 < v <= 1), "None or a number in (0, 1]")
        self._require("alpha", _is_number, "a finite number")
        self._require("router_temperature", lambda v: _is_number(v) and v > 0, "a number above 0")
        for name in ("router_noise", "init_std", "init_bias"):
            self._require(name, lambda v: _is_number(v) and v >= 0, "a number of at least 0")
        self._require(
            "adapt_norms", lambda v: isinstance(v, bool) or v == REPARAMETRIZED, f"True, False or {REPARAMETRIZED!r}"
        )
        for name in ("inference_mode", "adapt_bias", "router_per_layer", "train_base", "init_weights"):
            self._require(name, lambda v: isinstance(v, bool), "True or False")
        self._require("conv_split", lambda v: v in CONV_SPLITS, f"one of {', '.join(CONV_SPLITS)}")
        self._require("compute", lambda v: v in COMPUTE_PATHS, f"one of {', '.join(COMPUTE_PATHS)}")
        self._require(
            "router_top_k",
            lambda v: v is None or v <= self.num_adaptors,
            f"at most num_adaptors={self.num_adaptors}",
        )
        self._require(
            "rank_pattern",
            lambda v: isinstance(v, dict) and all(isinstance(k, str) and _is_int(1)(r) for k, r in v.items()),
            "a dict from layer names to ranks of at least 1",
        )
        self._require(
            "alpha_pattern",
            lambda v: isinstance(v, dict) and all(isinstance(k, str) and _is_number(a) for k, a in v.items()),
            "a dict from layer names to finite numbers",
        )
        self._require("modules_to_save", lambda v: v is None or _are(str)(v), "None or a list of module names")
        self._require(
            "layers_to_transform",
            lambda v: v is None or _is_int(0)(v) or (_are(int)(v) and all(map(_is_int(0), v))),
            "None, a layer index or a list of them",
        )
        self._require(
            "layers_pattern",
            lambda v: v is None or isinstance(v, str) or _are(str)(v),
            "None, a name or a list of names",
        )
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            self._require_regular_expressions(name)
        self._validate_client_names()
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _validate_client_names(self) -> None:
        names = self.client_names
        if names is None:
            return
        if not _are((str, int))(names) or any(isinstance(name, bool) for name in names):
            raise TypeError(f"FloralConfig.client_names={names!r}: expected a list of strings or integers.")
        if len(set(names)) != len(names):
            twice = sorted({repr(name) for name in names if names.count(name) > 1})
            raise ValueError(f"FloralConfig.client_names: {', '.join(twice)} given more than once; names must differ.")
        if len(names) != self.num_clients:
            raise ValueError(
                f"FloralConfig.client_names has {len(names)} names but num_clients={self.num_clients}: "
                "give one name per row of the router's table."
            )

    def _require_regular_expressions(self, name: str) -> None:
        value = getattr(self, name)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"FloralConfig.{name}={value!r} is not allowed: {pattern!r} is no regular expression ({error})."
                ) from None

    def _require(self, name: str, holds: Callable[[Any], bool], allowed: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"FloralConfig.{name}={value!r} is not allowed: expected {allowed}.")


def _is_int(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are(kind: type | tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple, set)) and all(isinstance(item, kind) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_set(name: str, value: Any) -> Any:
    """PEFT matches faster, and saves, sets of names; a str stays the regular expression it is."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"FloralConfig.{name}={value!r} is not allowed: expected a string or a list of strings.")
    return set(value)
