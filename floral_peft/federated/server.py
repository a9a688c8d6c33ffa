"""The server: its state, and a round as a function from state to state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.federated.aggregation import (
    Aggregate,
    ClientUpdate,
    UpdateError,
    WeightedMean,
    check_update,
    clip_update,
    keep_unused,
    mean_entropy,
    update_norm,
)
from floral_peft.federated.groups import ParameterGroups, tensors_of
from floral_peft.federated.seeding import ClientId


logger = logging.getLogger(__name__)

PrivateState = dict[str, Tensor]


class TooFewClientsError(RuntimeError):
    """Fewer updates than `min_clients` arrived; the server's state is unchanged."""


@dataclass(frozen=True)
class ServerState:
    """All that the server knows. No private tensor can be in it: it is built from the groups' allow-list.

    Args:
        round: Rounds done.
        tensors: The public tensors, in float32 at least, whatever the model computes in.
        optimizer: The server optimiser's state of each parameter.
    """

    round: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, groups: ParameterGroups) -> ServerState:
        """The state before the first round: a copy of the model's public tensors."""
        held = tensors_of(model)
        return cls(round=0, tensors={name: _master_copy(held[name]) for name in groups.public})


@dataclass(frozen=True)
class ServerSettings:
    """What a round needs to know beside its state.

    Args:
        groups: Which tensors are shared, clustered, private.
        routers: The shape (L, C) of the routers; None where nothing is clustered.
        build_optimizer: Makes the server's optimiser over a list of tensors.
        min_clients: Fewest updates of a round.
        max_update_norm: Clip updates to this L2 norm.
    """

    groups: ParameterGroups
    routers: torch.Size | None
    build_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    min_clients: int = 1
    max_update_norm: float | None = None


@dataclass(frozen=True)
class RoundReport:
    """What may be told of a round: aggregates only.

    Args:
        round: The round, from 1.
        train_loss: Mean loss of an example while training.
        clients_trained: Number of clients whose updates were averaged.
        clients_dropped: Client id → why its update was not: our own words, or the type of the exception.
        update_norm: L2 norm of the mean update.
        router_entropy: Mean entropy of the trained clients' routers, in nats. None for fewer than two clients: it
            would be the client's own.
        usage: p(c), the share of the cohort's examples that each adaptor stands for. None as above.
        seconds: Duration by phase.
    """

    round: int
    train_loss: float
    clients_trained: int
    clients_dropped: dict[ClientId, str]
    update_norm: float
    router_entropy: float | None
    usage: list[float] | None
    seconds: dict[str, float]


def run_round(
    state: ServerState,
    cohort: Sequence[ClientId],
    train: Callable[[ClientId, ServerState], tuple[ClientUpdate, PrivateState]],
    keep: Callable[[ClientId, int, PrivateState], None],
    settings: ServerSettings,
) -> tuple[ServerState, RoundReport]:
    """Train a cohort from the server's state and average what comes back.

    A client that raises, or whose update is wrong, costs its own update only: it is left out, its private state stays
    as it was, and the report says why.

    Args:
        state: The server's state, which is not changed.
        cohort: The clients of the round.
        train: A client's local training.
        keep: Stores a client's private state on the client's side: (client id, round, state). It counts once this
            function has returned; if it raises, the client's state is the one before.
        settings: The groups, the server's optimiser and the limits.

    Returns:
        The new state and the report.

    Raises:
        TooFewClientsError: Fewer than `min_clients` updates arrived.
    """
    round = state.round + 1
    began = time.perf_counter()
    training = 0.0
    mean = WeightedMean(state.tensors, settings.groups, len(cohort))
    trained: dict[ClientId, tuple[int, float]] = {}
    usages: list[Tensor] = []
    dropped: dict[ClientId, str] = {}
    for client_id in cohort:
        start = time.perf_counter()
        try:
            if client_id in trained:
                raise UpdateError(f"client {client_id!r} was counted already: it is in the cohort twice")
            update, private = train(client_id, state)
            check_update(update, client_id, round, state.tensors, settings.routers)
        except UpdateError as error:
            dropped[client_id] = str(error)
            logger.warning("round %d: %s; update dropped", round, error)
            continue
        except Exception as error:  # whatever a client's data, model code or memory does is the client's own loss
            # The error itself is not kept: its traceback holds on to the client's tensors.
            # Nor is its text in the report: it may quote a client's examples. The log is for whoever runs the client.
            logger.warning(
                "round %d: client %r: %s: %s; update dropped",
                round,
                client_id,
                type(error).__name__,
                error,
                exc_info=not dropped,
            )
            dropped[client_id] = type(error).__name__
            continue
        finally:
            training += time.perf_counter() - start
        if settings.max_update_norm is not None:
            update = clip_update(update, settings.max_update_norm)
        mean.add(update)
        keep(client_id, round, private)
        trained[client_id] = (update.num_examples, update.train_loss)
        if update.usage is not None:
            usages.append(update.usage)
    if len(trained) < settings.min_clients:
        reasons = "; ".join(f"client {client_id!r}: {reason}" for client_id, reason in list(dropped.items())[:3])
        raise TooFewClientsError(
            f"round {round}: {len(trained)} clients sent a good update, min_clients={settings.min_clients} are "
            f"needed; the server's state is unchanged. {len(dropped)} dropped: {reasons}; the log says more"
        )
    aggregate = mean.result()
    new = server_step(state, aggregate, settings)
    told = aggregate.usage is not None and len(trained) > 1
    examples = sum(count for count, _ in trained.values())
    return new, RoundReport(
        round=round,
        train_loss=math.fsum(count * loss for count, loss in trained.values()) / examples,
        clients_trained=len(trained),
        clients_dropped=dropped,
        update_norm=update_norm(aggregate.deltas),
        router_entropy=mean_entropy(usages) if told else None,
        usage=aggregate.usage.mean(dim=0).tolist() if told and aggregate.usage is not None else None,
        seconds={"train": training, "aggregate": time.perf_counter() - began - training},
    )


@torch.no_grad()
def server_step(state: ServerState, aggregate: Aggregate, settings: ServerSettings) -> ServerState:
    """One step of the server's optimiser with old − new as the gradient; SGD with rate 1 is the plain average.

    Statistics are averaged, never optimised: a running variance must stay one. Adaptors without users keep their
    value.
    """
    groups = settings.groups
    tensors = {name: value.clone() for name, value in state.tensors.items()}
    names = [*groups.shared, *groups.clustered]
    for name in names:
        tensors[name].grad = -aggregate.deltas[name].to(tensors[name])
    for name in groups.statistics:
        tensors[name] += aggregate.deltas[name].to(tensors[name])
    if not names:  # every parameter is private
        return ServerState(state.round + 1, tensors)
    optimizer = settings.build_optimizer([tensors[name] for name in names])
    for name in names:
        if name in state.optimizer:
            optimizer.state[tensors[name]] = _copied(state.optimizer[name])
    optimizer.step()
    memory = {name: dict(optimizer.state[tensors[name]]) for name in names if optimizer.state[tensors[name]]}
    for name in names:
        tensors[name].grad = None
    return ServerState(state.round + 1, keep_unused(tensors, state.tensors, aggregate.used(), groups), memory)


def _copied(memory: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in memory.items()}


def _master_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
