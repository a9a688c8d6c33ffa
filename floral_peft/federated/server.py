"""The server: its state, and the step that it makes of a cohort's mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from floral_peft.federated.aggregation import Aggregate, keep_unused
from floral_peft.federated.groups import ParameterGroups, tensors_of
from floral_peft.federated.processes import Message, pack_states, unpack_states
from floral_peft.federated.seeding import ClientId


if TYPE_CHECKING:
    from floral_peft.federated.routing import RouterUpdate


PrivateState = dict[str, Tensor]


@dataclass(frozen=True)
class ServerState:
    """All that the server knows. No private tensor can be in it: it is built from the groups' allow-list.

    Args:
        round: Rounds done.
        tensors: The public tensors, in float32 at least, whatever the model computes in.
        optimizer: The server optimiser's state of each parameter.
        routing: What the router's update remembers: sums over clients, float64 on the CPU.
        adaptors: The adaptors that there are, by the numbers that they had when the run began.
        wide: Whether clients still look for theirs among more of them, or of a larger rank, than may stay.
    """

    round: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    routing: dict[str, Tensor] = field(default_factory=dict)
    adaptors: tuple[int, ...] = ()
    wide: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        groups: ParameterGroups,
        routing: Mapping[str, Tensor] | None = None,
        adaptors: tuple[int, ...] = (),
        wide: bool = False,
    ) -> ServerState:
        """The state before the first round: a copy of the model's public tensors."""
        held = tensors_of(model)
        tensors = {name: _master_copy(held[name]) for name in groups.public}
        return cls(0, tensors, routing=dict(routing or {}), adaptors=adaptors, wide=wide)

    def to_message(self) -> Message:
        """The state, as one process tells it to another."""
        memory = [
            (
                [name, {key: value for key, value in entries.items() if not isinstance(value, Tensor)}],
                {key: value for key, value in entries.items() if isinstance(value, Tensor)},
            )
            for name, entries in self.optimizer.items()
        ]
        return pack_states([([self.round, [self.adaptors, self.wide]], self.tensors), (None, self.routing), *memory])

    def of_message(self, message: Message) -> ServerState:
        """The state that another process told, on the devices of this one."""
        ([round, [adaptors, wide]], tensors), (_, routing), *memory = unpack_states(message)
        devices = {name: value.device for name, value in self.tensors.items()}
        optimizer = {
            # Step counters stay on the CPU, where torch.optim keeps them.
            name: {
                **values,
                **{key: value if value.ndim == 0 else value.to(devices[name]) for key, value in held.items()},
            }
            for (name, values), held in memory
        }
        placed = {name: value.to(devices[name]) for name, value in tensors.items()}
        return ServerState(round, placed, optimizer, routing, tuple(adaptors), wide)


@dataclass(frozen=True)
class ServerSettings:
    """What a round needs to know beside its state.

    Args:
        groups: Which tensors are shared, clustered, private.
        routers: The shape (L, C) of the routers; None where nothing is clustered.
        build_optimizer: Makes the server's optimiser over a list of tensors.
        min_clients: Fewest updates of a round.
        max_update_norm: Clip updates to this L2 norm.
        clusters: The clients' true clusters, where they are known: to tell how well the routers find them.
        product: Average low-rank adaptors as matrices, not factor by factor.
        router_update: How clients find their routers; None where nothing is clustered.
    """

    groups: ParameterGroups
    routers: torch.Size | None
    build_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    min_clients: int = 1
    max_update_norm: float | None = None
    clusters: Mapping[ClientId, int] | None = None
    product: bool = False
    router_update: RouterUpdate | None = None

    @property
    def sums(self) -> Mapping[str, torch.Size]:
        """What clients tell for the router's update."""
        return {} if self.router_update is None or self.routers is None else self.router_update.sums(self.routers[-1])


@torch.no_grad()
def server_step(state: ServerState, aggregate: Aggregate, settings: ServerSettings) -> ServerState:
    """One step of the server's optimiser with old − new as the gradient; SGD with rate 1 is the plain average.

    Statistics are averaged, never optimised: a running variance must stay one. Adaptors without users keep their
    value.
    """
    groups = settings.groups
    routing = state.routing
    if settings.router_update is not None:
        routing = settings.router_update.absorb(routing, aggregate.sums)
    tensors = {name: value.clone() for name, value in state.tensors.items()}
    names = groups.optimized
    for name in names:
        tensors[name].grad = -aggregate.deltas[name].to(tensors[name])
    for name in groups.statistics:
        tensors[name] += aggregate.deltas[name].to(tensors[name])
    if not names:  # every parameter is private
        return replace(state, round=state.round + 1, tensors=tensors, optimizer={}, routing=routing)
    optimizer = settings.build_optimizer([tensors[name] for name in names])
    for name in names:
        if name in state.optimizer:
            optimizer.state[tensors[name]] = _copied(state.optimizer[name])
    optimizer.step()
    memory = {name: dict(optimizer.state[tensors[name]]) for name in names if optimizer.state[tensors[name]]}
    for name in names:
        tensors[name].grad = None
    kept = keep_unused(tensors, state.tensors, aggregate.used(), groups)
    return replace(state, round=state.round + 1, tensors=kept, optimizer=memory, routing=routing)


def _copied(memory: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in memory.items()}


def _master_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
