"""FloralConfig refuses what it cannot honour, by field name."""

from __future__ import annotations

from typing import Any

import pytest
from peft import PeftConfig, PeftType
from torch import nn

from floral_peft import FloralConfig

from .models import get_peft_model


BAD = [
    ("num_adaptors", 0),
    ("num_adaptors", 2.0),
    ("num_adaptors", True),
    ("r", 0),
    ("r", "8"),
    ("budget", 0),
    ("budget", 1.5),
    ("budget", float("nan")),
    ("min_rank", -1),
    ("alpha", float("inf")),
    ("alpha", None),
    ("target_modules", 3),
    ("target_modules", [1]),
    ("exclude_modules", {"a": 1}),
    ("modules_to_save", "head"),
    ("rank_pattern", {"lin": 0}),
    ("alpha_pattern", {"lin": "x"}),
    ("conv_split", "2d"),
    ("modules_to_save", 5),
    ("target_modules", "["),
    ("rank_pattern", {"[": 2}),
    ("layers_to_transform", "a"),
    ("layers_to_transform", [1.5]),
    ("layers_pattern", 3),
    ("inference_mode", "x"),
    ("adapt_bias", 1),
    ("adapt_norms", "reparametrised"),
    ("num_clients", 0),
    ("num_clients", "4"),
    ("router_temperature", 0),
    ("router_noise", -0.1),
    ("router_top_k", 0),
    ("router_top_k", 5),
    ("router_per_layer", None),
    ("shared_r", -1),
    ("train_base", "yes"),
    ("compute", "fast"),
    ("init_weights", "gaussian"),
    ("init_std", -1.0),
    ("init_bias", -1.0),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_with_the_field_the_value_and_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"FloralConfig\.{name}=.*(expected|regular expression)") as error:
        FloralConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "'a' given more than once"),
        (["a"], "1 names but num_clients=2"),
        ([1.5, 2], "strings or integers"),
        ("ab", "list of strings"),
        (5, "list of strings"),
    ],
)
def test_client_names_must_fit_the_table(names: list[Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FloralConfig(num_clients=2, client_names=names)


def test_layers_to_transform_needs_a_list_of_target_modules() -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        FloralConfig(target_modules="lin", layers_to_transform=1)
    with pytest.raises(ValueError, match="layers_pattern"):
        FloralConfig(target_modules=["lin"], layers_pattern="layers")


def test_the_type_is_a_real_member_of_peft_type() -> None:
    config = FloralConfig()
    assert config.peft_type is PeftType.FLORAL is PeftType("FLORAL")  # type: ignore[attr-defined]
    assert config.peft_type.value == "FLORAL"
    assert PeftType.FLORAL in list(PeftType)  # type: ignore[attr-defined]


def test_a_config_survives_saving_and_loading(tmp_path: Any) -> None:
    config = FloralConfig(
        num_adaptors=3, target_modules=["a", "b"], num_clients=2, client_names=["x", 7], rank_pattern={"a": 2}
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_an_unknown_target_names_itself() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), FloralConfig(target_modules=["nowhere"]))


def test_an_unsupported_layer_is_refused_by_name_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    with pytest.raises(ValueError, match=r"'1' \(LSTM\).*Linear.*exclude_modules"):
        get_peft_model(model, FloralConfig(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


def test_attention_projections_that_are_read_directly_are_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match=r"'0.out_proj'.*MultiheadAttention"):
        get_peft_model(model, FloralConfig(target_modules=["out_proj"]))
