"""Which of a model's tensors are shared, clustered or private: all that a federated method has to say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from floral_peft.federated.norms import resting_norms
from floral_peft.tuner import Role, buffer_roles, parameter_roles, private_buffers


if TYPE_CHECKING:
    from floral_peft.federated.method import Method


@dataclass(frozen=True)
class Clustered:
    """A tensor that holds one slice per adaptor, or belongs to one adaptor; slice c is averaged with weights p(k|c).

    Args:
        axis: The axis of length C.
        slot: Which row of the router weighs the slices, 0 unless every layer has a router of its own.
        adaptor: The number c of the adaptor to which the whole tensor belongs: it has no axis of length C then.
    """

    axis: int = 0
    slot: int = 0
    adaptor: int | None = None


#: What a method says of one tensor.
Group = Literal["shared", "private"] | Clustered


@dataclass(frozen=True)
class ParameterGroups:
    """The tensors of a model by who may see them. What no group names stays as the model was given.

    Args:
        shared: Parameters that all clients train together, averaged with p(k).
        statistics: Buffers that are averaged but never touched by a server optimiser: batch norm's running statistics.
        clustered: Tensors with a slice per adaptor, averaged slice by slice with p(k|c).
        private: Parameters, and statistics of its data, that never leave their client.
        roles: What each parameter is in the model (base, adaptor, router, ...).
        anchors: Parameter → the public tensor towards which local steps pull it, where the method says so.
    """

    shared: tuple[str, ...]
    statistics: tuple[str, ...]
    clustered: Mapping[str, Clustered]
    private: tuple[str, ...]
    roles: Mapping[str, Role]
    anchors: Mapping[str, str] = field(default_factory=dict)

    @property
    def public(self) -> tuple[str, ...]:
        """The allow-list: names of the tensors that clients send and the server keeps."""
        return tuple(dict.fromkeys((*self.shared, *self.statistics, *self.clustered)))

    @property
    def optimized(self) -> tuple[str, ...]:
        """The public parameters, which a server optimiser moves."""
        statistics = set(self.statistics)
        return (*self.shared, *(name for name in self.clustered if name not in statistics))

    @classmethod
    def of(cls, model: nn.Module, method: Method) -> ParameterGroups:
        """Ask a method about everything that trains in a model; a router belongs to its client in any case.

        Running statistics describe what the base computes: where it trains, the method is asked about them as about a
        part of it, or of an adaptor that has some of its own; except those of frozen norms, which rest.

        Raises:
            ValueError: The method does not fit the model, or the model has nothing to train.
        """
        roles = parameter_roles(model)
        method.check(roles)
        groups: dict[str, Group] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or roles[name].kind == "router":
                groups[name] = _checked(method, name, method.group(name, roles[name]))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the model has nothing to train: none of its parameters requires a gradient.")
        private = private_buffers(model)
        trains = any(roles[name].kind == "base" for name in groups)
        kinds = buffer_roles(model)
        buffers = _float_buffers(model, roles, private) if trains else ()
        statistics = {name: _checked(method, name, method.group(name, kinds[name])) for name in buffers}
        everything = groups | statistics
        return cls(
            shared=tuple(name for name, group in groups.items() if group == "shared"),
            statistics=tuple(name for name, group in statistics.items() if group != "private"),
            clustered={name: group for name, group in everything.items() if isinstance(group, Clustered)},
            private=(*(name for name, group in everything.items() if group == "private"), *private),
            roles={name: roles[name] for name in groups},
            anchors={name: anchor for name in groups if (anchor := method.anchor(name)) is not None},
        )


def _checked(method: Method, name: str, group: Group) -> Group:
    if group not in ("shared", "private") and not isinstance(group, Clustered):
        raise ValueError(
            f'method "{method.name}": group({name!r}, ...) returned {group!r}; it must be "shared", "private" or '
            "Clustered(...)."
        )
    return group


def _float_buffers(model: nn.Module, roles: Mapping[str, Role], private: Collection[str]) -> tuple[str, ...]:
    """Floating-point buffers that a checkpoint of the model holds, except private, a router's and resting norms'."""
    routers = [name.rsplit(".", 2)[0] for name, role in roles.items() if role.kind == "router"]
    others = tuple(f"{name}." for name in (*routers, *resting_norms(model)))
    saved = model.state_dict(keep_vars=True)
    return tuple(
        name
        for name, buffer in model.named_buffers()
        if name in saved and buffer.is_floating_point() and name not in private and not name.startswith(others)
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model by name, without autograd's history: writing to one changes the model."""
    return {
        **{name: parameter.detach() for name, parameter in model.named_parameters()},
        **{name: buffer.detach() for name, buffer in model.named_buffers()},
    }
