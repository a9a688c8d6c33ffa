"""Saving and resuming a run: JSON and safetensors, with a manifest of digests that is renamed into place last."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from floral_peft.federated.files import digest, file_digest, is_temporary, remove, sync, write_file
from floral_peft.federated.identity import Identity, differing
from floral_peft.federated.server import ServerState


logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_MANIFEST = "manifest.json"
_TENSORS, _OPTIMIZER, _STATE = "server/tensors.safetensors", "server/optimizer.safetensors", "server/state.json"
_MOST_JSON = 2**28  # bytes; a file that claims to be larger is not read
#: What may run code when it is loaded, by its suffix. No such file is ever opened.
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
#: What damaged or foreign JSON and safetensors raise.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete, damaged, or not of this run; or it cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """All from which a run goes on.

    Args:
        server: The server's state.
        private: Names of the files that hold the clients' private state of that round, which stays where it is.
        trainer: What else the trainer remembers, as JSON holds it.
    """

    server: ServerState
    private: Sequence[str] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(output_dir: Path, checkpoint: Checkpoint, run: Identity) -> Path:
    """Save a checkpoint as `checkpoint-<round>`. It counts as one once its manifest is there.

    Args:
        output_dir: The run's folder.
        checkpoint: The state. The server's tensors are the public ones, so nothing private can be saved.
        run: What defines the run, to refuse another one when resuming.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk is full, or does not let us write. Checkpoints of other rounds are as they were.
    """
    state = checkpoint.server
    folder = output_dir / f"checkpoint-{state.round}"
    memory = {
        (name, key): value for name, entries in sorted(state.optimizer.items()) for key, value in entries.items()
    }
    tensors = {path: value for path, value in memory.items() if isinstance(value, Tensor)}
    # Tensor names and the optimiser's keys are joined by a position, not by a separator that either might hold.
    document = {
        "round": state.round,
        "run": run,
        "optimizer_tensors": list(tensors),
        "adaptors": list(state.adaptors),
        "wide": state.wide,
        "routing": {name: value.tolist() for name, value in state.routing.items()},
        "optimizer_values": [[*path, value] for path, value in memory.items() if path not in tensors],
        "private": list(checkpoint.private),
        "trainer": checkpoint.trainer,
    }
    contents = {
        _TENSORS: save(_on_cpu(state.tensors)),
        _OPTIMIZER: save(_on_cpu({str(index): value for index, value in enumerate(tensors.values())})),
        _STATE: json.dumps(document, indent=1).encode(),
    }
    files = {name: {"size": len(content), "sha256": digest(content)} for name, content in contents.items()}
    with _writing(folder):
        _remove_incomplete(folder)
        (folder / "server").mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_file(folder / name, content)
        write_file(folder / _MANIFEST, json.dumps({"files": files}, indent=1).encode())
        sync(output_dir)
    return folder


def load_checkpoint(folder: Path, reference: ServerState, run: Identity) -> Checkpoint:
    """Load a checkpoint that `save_checkpoint` wrote.

    Args:
        folder: The checkpoint's folder.
        reference: A state of this run: names, shapes, dtypes and devices of its tensors.
        run: What defines this run.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged, or of another model, method or setting.
    """
    document = _read_state(folder)
    _check_run(folder, document, run)
    try:
        round = document["round"]
        if type(round) is not int or folder.name != f"checkpoint-{round}":
            raise CheckpointError(f"{folder} is damaged or has another's name: it holds round {round!r}.")
        server = ServerState(round, _read_tensors(folder, reference), _read_memory(folder, document))
        memory = {name: _placed(entries, reference.tensors[name]) for name, entries in server.optimizer.items()}
        server = replace(server, optimizer=memory)
        routing = {n: torch.tensor(value, dtype=torch.float64) for n, value in document.get("routing", {}).items()}
        server = replace(
            server, routing=routing, adaptors=tuple(document.get("adaptors", ())), wide=bool(document.get("wide"))
        )
        return Checkpoint(server, [str(name) for name in document["private"]], dict(document["trainer"]))
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder} is damaged: {type(error).__name__}: {error}") from error


def saved_adaptors(folder: Path, run: Identity) -> tuple[list[int], bool]:
    """The adaptors that a checkpoint holds, as in `ServerState`: their first numbers, and whether they are wide.

    Args:
        folder: The checkpoint's folder.
        run: What defines this run.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged, or of another run.
    """
    document = _read_state(folder, checked=(_STATE,))
    _check_run(folder, document, run)
    try:
        return [int(number) for number in document.get("adaptors", ())], bool(document.get("wide"))
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder} is damaged: {type(error).__name__}: {error}") from error


def _check_run(folder: Path, document: Mapping[str, Any], run: Identity) -> None:
    saved_run = document.get("run")
    if not isinstance(saved_run, dict):
        raise CheckpointError(f"{folder} does not say which run it is of: it was not written by this version.")
    name = differing(saved_run, run)
    if name is not None:
        raise CheckpointError(
            f"{folder} is of another run: {name} was {saved_run[name]!r}, now it is {run[name]!r}. Resume with "
            "the settings that it began with, or train anew in another output_dir."
        )


def private_files(output_dir: Path, rounds: Collection[int]) -> dict[int, list[str]]:
    """The names of the files of private state that checkpoints need, by their rounds.

    A damaged checkpoint is left out, and the log says so: the run cannot come back to it in any case.
    """
    found: dict[int, list[str]] = {}
    for round in rounds:
        try:
            document = _read_state(output_dir / f"checkpoint-{round}", checked=(_STATE,))
            found[round] = [str(name) for name in document["private"]]
        except (CheckpointError, *_UNREADABLE) as error:
            logger.warning("%s", error)
    return found


def checkpoint_rounds(output_dir: Path) -> list[int]:
    """The rounds of all complete checkpoints of a run, ascending."""
    if not output_dir.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in output_dir.iterdir()]
    return sorted(int(match[1]) for match, path in found if match and (path / _MANIFEST).is_file())


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | Path | bool) -> Path:
    """The folder to resume from.

    Args:
        output_dir: The run's folder.
        resume_from_checkpoint: True or "true" for the newest checkpoint, or a checkpoint's folder.

    Raises:
        CheckpointError: There is no such checkpoint, or it is not in the run's folder.
    """
    if resume_from_checkpoint in (True, "true"):
        rounds = checkpoint_rounds(output_dir)
        if not rounds:
            raise CheckpointError(f"resume_from_checkpoint=True: {output_dir} holds no complete checkpoint.")
        return output_dir / f"checkpoint-{rounds[-1]}"
    folder = Path(str(resume_from_checkpoint))
    if not (folder / _MANIFEST).is_file():
        pickled = [path.name for path in (folder, *_inside(folder)) if path.suffix in _PICKLED]
        hint = f" {pickled[0]} may run any code when it is loaded: only JSON and safetensors are." if pickled else ""
        raise CheckpointError(f"resume_from_checkpoint={str(folder)!r} is not a complete checkpoint.{hint}")
    if folder.resolve().parent != output_dir.resolve():
        raise CheckpointError(
            f"resume_from_checkpoint={str(folder)!r} is not in output_dir={str(output_dir)!r}, where its clients' "
            "private state would be: set output_dir to the folder of that run."
        )
    return folder


def prune_checkpoints(output_dir: Path, keep: int | None, spare: Collection[int] = ()) -> None:
    """Delete the oldest checkpoints.

    Args:
        output_dir: The run's folder.
        keep: How many stay; None: all.
        spare: Rounds whose checkpoints stay among them, such as the best one's.
    """
    if keep is None:
        return
    rounds = checkpoint_rounds(output_dir)
    protected = {*rounds[-1:], *(round for round in spare if round in rounds)}
    excess = max(0, len(rounds) - max(keep, len(protected)))
    _delete(output_dir, [round for round in rounds if round not in protected][:excess])


def discard_checkpoints(output_dir: Path, after: int) -> None:
    """Delete the checkpoints after a round, to which a run that goes on from it cannot go back any more.

    With them go what checkpoints a crash has left incomplete.
    """
    _delete(output_dir, [round for round in reversed(checkpoint_rounds(output_dir)) if round > after])
    for folder in _inside(output_dir):
        if _NAME.fullmatch(folder.name) and not (folder / _MANIFEST).is_file():
            _remove_incomplete(folder)


def _delete(output_dir: Path, rounds: list[int]) -> None:
    """All of them stop being checkpoints, in this order and on the disk, before the first file is deleted."""
    folders = [output_dir / f"checkpoint-{round}" for round in rounds]
    for folder in folders:
        remove(folder / _MANIFEST)
        sync(folder)
    for folder in folders:
        remove(folder)


def _remove_incomplete(folder: Path) -> None:
    """Delete what we wrote of a checkpoint, and the folder unless there is something else in it."""
    if not folder.is_dir():
        return
    remove(folder / _MANIFEST)
    for path in _inside(folder):
        if path.name == "server" or is_temporary(path):
            remove(path)
    if not _inside(folder):
        remove(folder)


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}. The checkpoints before it are as they were: make room and "
            "resume from the newest."
        ) from error


def _read_state(folder: Path, checked: Sequence[str] = (_TENSORS, _OPTIMIZER, _STATE)) -> dict[str, Any]:
    """A checkpoint's JSON, once the digests of its files are found right. Large files are not held in memory."""
    try:
        if (folder / _MANIFEST).stat().st_size > _MOST_JSON:
            raise ValueError("the manifest is too large")
        files = json.loads((folder / _MANIFEST).read_bytes())["files"]
        named = {name: (files[name]["size"], files[name]["sha256"]) for name in checked}
        damaged = [
            name
            for name, (size, sha256) in named.items()
            if (folder / name).stat().st_size != size or file_digest(folder / name) != sha256
        ]
        if named[_STATE][0] > _MOST_JSON:
            damaged.append(_STATE)
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {error}") from error
    if damaged:
        raise CheckpointError(f"{folder} is damaged: the digests of {damaged} do not match; use an older checkpoint.")
    try:
        document = json.loads((folder / _STATE).read_bytes())
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder} is damaged: {_STATE}: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{folder} is damaged: {_STATE} is no JSON object.")
    return document


def _read_tensors(folder: Path, reference: ServerState) -> dict[str, Tensor]:
    """The public tensors. Their names, shapes and dtypes are compared before any of them is read."""
    with safe_open(folder / _TENSORS, framework="pt") as file:
        names = set(file.keys())
        if names != reference.tensors.keys():
            others = sorted(names ^ reference.tensors.keys())[:5]
            raise CheckpointError(f"{folder} is of another model: the tensors {others} are not in both.")
        for name, value in reference.tensors.items():
            shape, expected = tuple(file.get_slice(name).get_shape()), tuple(value.shape)
            if shape != expected:
                raise CheckpointError(f"{folder} is of another model: {name} is {shape}, expected {expected}.")
        found = {name: file.get_tensor(name).to(value.device, copy=True) for name, value in reference.tensors.items()}
    for name, value in reference.tensors.items():
        dtype = found[name].dtype
        if dtype != value.dtype:
            raise CheckpointError(f"{folder} is of another model: {name} is {dtype}, expected {value.dtype}.")
    return found


def _read_memory(folder: Path, document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The server optimiser's state, on the CPU."""
    memory: dict[str, dict[str, Any]] = {}
    with safe_open(folder / _OPTIMIZER, framework="pt") as file:
        for index, (name, key) in enumerate(document["optimizer_tensors"]):
            memory.setdefault(name, {})[key] = file.get_tensor(str(index)).clone()
    for name, key, value in document["optimizer_values"]:
        memory.setdefault(name, {})[key] = value
    return memory


def _placed(memory: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """An optimiser's state of a parameter, where torch.optim keeps it: step counters stay on the CPU."""
    return {
        key: value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
        for key, value in memory.items()
    }


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
