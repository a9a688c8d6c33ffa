"""A round as a function: from the server's state and a cohort to the next state and a report."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from floral_peft.federated.aggregation import (
    ClientUpdate,
    UpdateError,
    WeightedMean,
    check_update,
    clip_update,
    cluster_mismatch,
    mean_entropy,
    update_norm,
)
from floral_peft.federated.processes import Processes, pack_states, unpack_states
from floral_peft.federated.product import ProductMean
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.server import PrivateState, ServerSettings, ServerState, server_step
from floral_peft.federated.stopwatch import Stopwatch


logger = logging.getLogger(__name__)

#: What comes of a client's local training: its update and its new private tensors, or what it raised.
Outcome = tuple[ClientUpdate, PrivateState] | Exception


class TooFewClientsError(RuntimeError):
    """Fewer updates than `min_clients` arrived; the server's state is unchanged."""


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
        adaptors: The adaptors to which `usage` refers, by the numbers that they had when the run began.
        switches: How many of the trained clients have another best adaptor than at their last participation, and no
            duplicate of that one; where the router's update tells. None as above.
        truncation: What `adaptor_aggregation="product"` loses: the largest relative error of an adaptor. Else None.
        mismatch: `cluster_mismatch`, where the true clusters are known. None as above.
        regrets: What an adaptor's users would lose with another one, as of `regrets`, before any was removed. None
            where it is unknown, and as above.
        lost: Layer → what the compression of the adaptors after the round has cut off; empty without one.
        pruned: The adaptors that were removed after the round, by their first numbers, and why: as of `told`.
        bytes_down: What a client is sent: the public tensors.
        bytes_up: What a client sends: its deltas and its usage.
        seconds: Duration by phase, on the main process; "route" is what clients do on arrival, "wait" is for the other
            processes to finish.
    """

    round: int
    train_loss: float
    clients_trained: int
    clients_dropped: dict[ClientId, str]
    update_norm: float
    router_entropy: float | None
    usage: list[float] | None
    switches: int | None
    truncation: float | None
    mismatch: float | None
    bytes_down: int
    bytes_up: int
    seconds: dict[str, float]
    adaptors: list[int] = field(default_factory=list)
    regrets: list[list[float]] | None = None
    lost: dict[str, float] = field(default_factory=dict)
    pruned: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Answer:
    """A client's part in a round, in numbers that every process may know: why it was dropped, or what it counts."""

    dropped: str | None = None
    num_examples: int = 0
    train_loss: float = 0.0
    usage: list[list[float]] | None = None


def run_round(
    state: ServerState,
    cohort: Sequence[ClientId],
    train: Callable[[Sequence[ClientId], ServerState], Iterable[tuple[ClientId, Outcome]]],
    keep: Callable[[ClientId, int, PrivateState], None],
    settings: ServerSettings,
    processes: Processes | None = None,
    clock: Stopwatch | None = None,
) -> tuple[ServerState, RoundReport]:
    """Train a cohort from the server's state and average what comes back.

    A client that raises, or whose update is wrong, costs its own update only: it is left out, its private state stays
    as it was, and the report says why. All processes end with the same state and report.

    Args:
        state: The server's state, which is not changed.
        cohort: The clients of the round.
        train: Trains those clients of the cohort that are this process's; tells of each its id and what came of it.
        keep: Stores a client's private state on the client's side: (client id, round, state). Called on the main
            process only. It counts once this function has returned; if it raises, the state is the one before.
        settings: The groups, the server's optimiser and the limits.
        processes: Those that share the cohort; this one alone by default.
        clock: Takes the time by phase.

    Returns:
        The new state and the report.

    Raises:
        TooFewClientsError: Fewer than `min_clients` updates arrived.
    """
    round, processes, clock = state.round + 1, processes or Processes(), clock or Stopwatch()
    given = settings.routers, settings.sums
    mean = (
        ProductMean(state.tensors, settings.groups, cohort, *given)
        if settings.product
        else WeightedMean(state.tensors, settings.groups, len(cohort), *given)
    )
    mine: list[tuple[ClientId, _Answer]] = []
    away: list[tuple[ClientId, PrivateState]] = []  # private tensors on their way to the main process
    counted: set[ClientId] = set()
    for client_id, outcome in train(cohort, state):
        accepted = _accepted(outcome, client_id, counted, state, settings)
        if isinstance(accepted, Exception):
            reason = _told(accepted, client_id, round, trace=len(mine) == len(counted))
            mine.append((client_id, _Answer(dropped=reason)))
            continue
        update, private = accepted
        mean.add(update)
        clock.lap("reduce")
        if processes.is_main:
            keep(client_id, round, private)
            clock.lap("store")
        elif private:
            away.append((client_id, private))
        counted.add(client_id)
        usage = None if update.usage is None else update.usage.tolist()
        mine.append((client_id, _Answer(None, update.num_examples, update.train_loss, usage)))
        del outcome, accepted, update, private  # not while the next client trains
    answers = _everybodys(mine, cohort, processes)
    clock.lap("wait")
    trained = [(client_id, answer) for client_id, answer in answers if answer.dropped is None]
    dropped = {client_id: answer.dropped for client_id, answer in answers if answer.dropped is not None}
    if len(trained) < settings.min_clients:
        first = [(f"client {client_id!r}: ", reason) for client_id, reason in list(dropped.items())[:3]]
        reasons = "; ".join(who + reason.removeprefix(who) for who, reason in first)
        raise TooFewClientsError(
            f"round {round}: {len(trained)} clients sent a good update, min_clients={settings.min_clients} are "
            f"needed; the server's state is unchanged. {len(dropped)} dropped: {reasons}; the log says more"
        )
    for position, message in enumerate(processes.gather(pack_states(away))):
        for client_id, private in unpack_states(message) if position else ():
            keep(client_id, round, private)
    clock.lap("store")
    mean.reduce(processes)
    aggregate = mean.result()
    clock.lap("reduce")
    new = server_step(state, aggregate, settings)
    clock.lap("server step")
    usages = [torch.tensor(answer.usage, dtype=torch.float64) for _, answer in trained if answer.usage is not None]
    told = len(usages) > 1
    sent = sum(value.nbytes for value in state.tensors.values())
    return new, RoundReport(
        round=round,
        train_loss=math.fsum(answer.num_examples * answer.train_loss for _, answer in trained)
        / sum(answer.num_examples for _, answer in trained),
        clients_trained=len(trained),
        clients_dropped=dropped,
        update_norm=update_norm(aggregate.deltas),
        router_entropy=mean_entropy(usages) if told else None,
        usage=aggregate.usage.mean(dim=0).tolist() if told and aggregate.usage is not None else None,
        switches=int(aggregate.sums["switches"]) if told and "switches" in aggregate.sums else None,
        truncation=aggregate.truncation,
        mismatch=cluster_mismatch(usages, [settings.clusters[client_id] for client_id, _ in trained])
        if told and settings.clusters is not None
        else None,
        bytes_down=sent,
        bytes_up=sent + (usages[0].nbytes if usages else 0) + sum(value.nbytes for value in aggregate.sums.values()),
        seconds=clock.seconds,
        adaptors=list(state.adaptors),
    )


def _accepted(
    outcome: Outcome, client_id: ClientId, counted: Collection[ClientId], state: ServerState, settings: ServerSettings
) -> Outcome:
    """An outcome that counts, its update clipped; or the exception that says why it does not."""
    if isinstance(outcome, Exception):
        return outcome
    try:
        update, private = outcome
        if client_id in counted:
            raise UpdateError(f"client {client_id!r} was counted already: it is in the cohort twice")
        check_update(update, client_id, state.round + 1, state.tensors, settings.routers, settings.sums)
        return (update if settings.max_update_norm is None else clip_update(update, settings.max_update_norm)), private
    except Exception as error:  # an update may be anything at all
        return error


def _told(error: Exception, client_id: ClientId, round: int, trace: bool) -> str:
    """Log why a client's update is dropped, and let go of what the client held.

    Returns:
        What may be reported: our own words, or the exception's type. Its text may quote a client's examples; the log
        is for whoever runs the client.
    """
    if isinstance(error, UpdateError):
        logger.warning("round %d: %s; update dropped", round, error)
        return str(error)
    kind = type(error).__name__
    where = "\n" + "".join(traceback.format_exception(error)) if trace else ""
    logger.warning("round %d: client %r: %s: %s; update dropped%s", round, client_id, kind, error, where)
    # The client's tensors hang on the traceback. The log has it as text, as a handler may keep what it is given.
    pending: list[BaseException | None] = [error]
    while pending:
        if (one := pending.pop()) is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            pending += [one.__cause__, one.__context__]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        clear_device_cache(garbage_collection=True)
    return kind


def _everybodys(
    mine: list[tuple[ClientId, _Answer]], cohort: Sequence[ClientId], processes: Processes
) -> list[tuple[ClientId, _Answer]]:
    """The answers that all processes have got, in the order of the cohort."""
    if processes.count == 1:
        return mine
    told = processes.collect([(client_id, vars(answer)) for client_id, answer in mine])
    place = {client_id: position for position, client_id in enumerate(cohort)}
    answers = [(client_id, _Answer(**values)) for part in told for client_id, values in part]
    return sorted(answers, key=lambda item: place[item[0]])
