"""Methods as statements about groups of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
from torch import nn

from floral_peft.federated import Clustered, Group, Method, ParameterGroups, get_method, method_names, register_method
from floral_peft.federated import method as registry
from floral_peft.tuner import FloralConfig, Role, parameter_roles

from .clients import floral_net, net


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    yield


def test_floral_shares_the_base_clusters_the_adaptors_and_keeps_the_router() -> None:
    groups = ParameterGroups.of(floral_net(net(norm=True)), get_method("floral"))
    kinds = {
        name: sorted({groups.roles[parameter].kind for parameter in held if parameter not in groups.statistics})
        for name, held in (("shared", groups.shared), ("clustered", groups.clustered), ("private", groups.private))
    }
    assert kinds == {"shared": ["base"], "clustered": ["adaptor"], "private": ["router"]}
    prefix = "base_model.model.1."
    of_adaptors = {f"{prefix}floral_{statistic}.default" for statistic in ("mean", "var")}
    of_all = {f"{prefix}base_layer.running_{statistic}" for statistic in ("mean", "var")}
    assert (
        set(groups.statistics) == of_adaptors | of_all
        and set(groups.statistics) & set(groups.clustered) == of_adaptors
    )
    assert not set(groups.public) & set(groups.private)


def test_each_adaptor_is_a_slice_along_the_axis_of_length_c() -> None:
    model = floral_net(num_adaptors=5)
    groups = ParameterGroups.of(model, get_method("floral"))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert len(groups.clustered) > 0
    assert all(shapes[name][cluster.axis] == 5 for name, cluster in groups.clustered.items())


def test_a_frozen_base_is_no_ones() -> None:
    groups = ParameterGroups.of(floral_net(net(norm=True), train_base=False), get_method("floral"))
    assert groups.shared == groups.statistics == ()


def test_a_shared_adaptor_is_shared() -> None:
    groups = ParameterGroups.of(floral_net(train_base=False, shared_r=1), get_method("floral"))
    assert {groups.roles[name].kind for name in groups.shared} == {"shared_adaptor"}


def test_the_router_is_private_even_where_it_does_not_train() -> None:
    assert len(ParameterGroups.of(floral_net(num_adaptors=1), get_method("floral")).private) == 1


def test_fedavg_shares_all_that_trains_and_the_running_statistics() -> None:
    model = net(norm=True)
    model[0].bias.requires_grad_(False)
    groups = ParameterGroups.of(model, get_method("fedavg"))
    assert groups.shared == ("0.weight", "1.weight", "1.bias", "3.weight", "3.bias")
    assert groups.statistics == ("1.running_mean", "1.running_var")
    assert groups.clustered == {}
    assert groups.private == ()


@pytest.mark.parametrize("given", ["clustered", "priv", None])
def test_a_group_that_there_is_not_is_named(given: Any) -> None:
    class Mistaken(Method):
        name = "mistaken"

        def group(self, name: str, role: Role) -> Group:
            result: Group = given if name.startswith("2.") else "shared"
            return result

    expected = rf'method "mistaken": group\(\'2.weight\', ...\) returned {given!r}; it must be "shared"'
    with pytest.raises(ValueError, match=expected):
        ParameterGroups.of(net(), Mistaken())


def test_fedavg_takes_pefts_other_models() -> None:
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"]))
    assert len(ParameterGroups.of(model, get_method("fedavg")).shared) == 2


def test_methods_refuse_models_that_they_cannot_train() -> None:
    with pytest.raises(ValueError, match='method "floral" needs a model with FLORAL adaptors'):
        ParameterGroups.of(net(), get_method("floral"))
    with pytest.raises(ValueError, match=r'method "fedavg" trains one model for all.*method="floral"'):
        ParameterGroups.of(floral_net(), get_method("fedavg"))
    with pytest.raises(ValueError, match="nothing to train"):
        ParameterGroups.of(net().requires_grad_(False), get_method("fedavg"))


def test_a_method_makes_its_model_of_a_base_model() -> None:
    base, adaptors = net(), FloralConfig(num_adaptors=3, target_modules=["0"])
    assert get_method("fedavg").prepare(base, adaptors) is base
    prepared: Any = get_method("floral").prepare(base, adaptors)
    assert prepared.num_adaptors == 3
    get_method("floral").check(parameter_roles(prepared))


def test_an_unknown_method_names_the_nearest() -> None:
    assert {"fedavg", "floral"} <= set(method_names())
    with pytest.raises(ValueError, match=r'method="florall" must be one of .*, floral, .* Did you mean "floral"'):
        get_method("florall")
    with pytest.raises(TypeError, match="method must be a name or a Method instance, got None"):
        get_method(None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_own_registry")
def test_a_users_method_is_one_class() -> None:
    @register_method
    class LocalHead(Method):
        name = "local_head"

        def group(self, name: str, role: Role) -> Group:
            return "private" if name.startswith("2.") else "shared"

    groups = ParameterGroups.of(net(), get_method("local_head"))
    assert groups.private == ("2.weight", "2.bias")
    assert groups.shared == ("0.weight", "0.bias")
    assert get_method(LocalHead()).name == "local_head"


@pytest.mark.usefixtures("_own_registry")
def test_two_methods_cannot_have_one_name() -> None:
    class Other(Method):
        name = "floral"

        def group(self, name: str, role: Role) -> Group:
            return Clustered(axis=0)

    with pytest.raises(ValueError, match='called "floral" is registered already: Floral'):
        register_method(Other)


@pytest.mark.usefixtures("_own_registry")
def test_a_method_without_a_name_is_told_to_have_one() -> None:
    class Nameless(Method):
        def group(self, name: str, role: Role) -> Group:
            return "shared"

    for use in (lambda: register_method(Nameless), lambda: get_method(Nameless())):
        with pytest.raises(TypeError, match="Nameless has no name: give the class one"):
            use()

    class NamedByInstance(Nameless):
        def __init__(self) -> None:
            self.name = "own"  # type: ignore[misc]

    assert get_method(NamedByInstance()).name == "own"


def test_a_parameter_of_which_no_one_speaks_is_untouched() -> None:
    class OnlyHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
            self.body.requires_grad_(False)

    held: Any = ParameterGroups.of(OnlyHead(), get_method("fedavg"))
    assert held.public == ("head.weight", "head.bias")
