"""Whether a run's clients train in turn or side by side: as asked for, or as measured."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from floral_peft.federated.client import LocalTraining
from floral_peft.federated.cohort import CohortTraining, InTurn, Load
from floral_peft.federated.files import write_file
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.server import ServerState
from floral_peft.federated.side_by_side import SideBySide
from floral_peft.federated.workplace import Workplace


logger = logging.getLogger(__name__)

KINDS = ("loop", "vectorized")

#: Most clients, and their steps, on which both kinds are timed.
TRIAL_CLIENTS = 32
TRIAL_STEPS = 2
#: Clients in turn are timed for so many seconds at most.
TRIAL_SECONDS = 2.0

#: Side by side must be so many times as fast: a smaller advantage may be chance, and then differ from run to run.
MARGIN = 1.5
#: On a CPU fewer clients a round train in turn, untried: there is little to gain, and so runs are equal to the bit.
CPU_CLIENTS = 8


def build_training(kind: str, place: Workplace) -> CohortTraining:
    """The training of that kind: "loop" or "vectorized"."""
    return SideBySide(place) if kind == "vectorized" else InTurn(LocalTraining(place))


def choose_kind(place: Workplace, client_ids: Sequence[ClientId], load: Load, state: ServerState, path: Path) -> str:
    """What `args.cohort` says, "auto" by measuring both kinds on a few steps of some of a round's clients.

    Args:
        place: Of the training. The clients' results, and nothing else of it, are thrown away.
        client_ids: A round's clients.
        load: As of `CohortTraining`.
        state: The server's state.
        path: Where the choice is kept: a run that is resumed on the same kind of device does not choose again, so its
            bits do not depend on timing.

    Returns:
        "loop" or "vectorized".

    Raises:
        ValueError: "vectorized" is asked for, but this model or these settings cannot be.
    """
    args = place.args
    if args.cohort == "loop":
        return "loop"
    device = place.accelerator.device.type
    if args.cohort == "auto":
        if device == "cpu" and len(client_ids) < CPU_CLIENTS:
            return "loop"
        if state.round and (kept := _read(path)).get("device") == device and kept.get("cohort") in KINDS:
            return str(kept["cohort"])
    few = replace(args, local_epochs=1, local_steps=TRIAL_STEPS)
    trial = replace(place, args=few)
    reason = _obstacle(trial, client_ids[:3], load, state)
    if args.cohort == "vectorized":
        if reason is not None:
            raise ValueError(f'cohort="vectorized": {reason.rstrip(".")}. Choose cohort="auto" or "loop".')
        return "vectorized"
    seconds = {} if reason is not None else _seconds_per_client(trial, client_ids, load, state)
    faster = "vectorized" in seconds and _is_faster(seconds, trial, client_ids)
    kind = "vectorized" if faster else "loop"
    logger.info("clients train by cohort=%r: %s", kind, reason or f"seconds per client {seconds}")
    found = {"cohort": kind, "device": device, "seconds_per_client": seconds, "reason": reason}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(found, indent=2).encode())
    return kind


def _obstacle(place: Workplace, client_ids: Sequence[ClientId], load: Load, state: ServerState) -> str | None:
    """Why clients cannot train side by side; None if they can."""
    try:
        side_by_side = SideBySide(place)
    except ValueError as error:
        return str(error)
    outcomes = list(side_by_side(client_ids, load, state))
    # A client that fails alone too says nothing of the model.
    return side_by_side.failure if any(not isinstance(outcome, Exception) for outcome in outcomes) else None


def _seconds_per_client(
    place: Workplace, client_ids: Sequence[ClientId], load: Load, state: ServerState
) -> dict[str, float]:
    """Of both kinds; of one only where a chunk holds a single client."""
    side_by_side = SideBySide(place)
    some = side_by_side.chunks(client_ids)[0][:TRIAL_CLIENTS]
    in_turn = InTurn(LocalTraining(place))
    seconds = {}
    for _ in range(2):  # the first is to warm up
        seconds["loop"] = _time(in_turn, some, load, state)
        if len(some) > 1:
            seconds["vectorized"] = _time(side_by_side, some, load, state)
    return seconds


def _is_faster(seconds: Mapping[str, float], place: Workplace, client_ids: Sequence[ClientId]) -> bool:
    """Whether a round side by side is clearly faster, by its busiest process: a chunk is one process's."""
    processes = place.accelerator.num_processes
    sizes = sorted(map(len, SideBySide(place).chunks(client_ids)), reverse=True)
    busiest = sum(sizes[::processes])
    return MARGIN * seconds["vectorized"] * busiest < seconds["loop"] * -(-len(client_ids) // processes)


def _time(training: CohortTraining, client_ids: Sequence[ClientId], load: Load, state: ServerState) -> float:
    """Seconds per client, of as many clients as can be trained in `TRIAL_SECONDS`."""
    began, count = time.perf_counter(), 0
    for _ in training(client_ids, load, state):
        count += 1
        if time.perf_counter() - began > TRIAL_SECONDS and isinstance(training, InTurn):
            break
    return (time.perf_counter() - began) / count


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
