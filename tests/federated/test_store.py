"""Private state and checkpoints on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from floral_peft.federated import CheckpointError, ServerState, StoreError, store
from floral_peft.federated.checkpoint import (
    Checkpoint,
    checkpoint_rounds,
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from floral_peft.federated.files import Draft, digest, write_file
from floral_peft.federated.segments import SegmentDraft
from floral_peft.federated.store import PrivateStore


def value(number: float) -> dict[str, torch.Tensor]:
    return {"router": torch.tensor([number, -number])}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def numbers(store: PrivateStore) -> dict[Any, int]:
    """What a store holds of `value(number)`, by client."""
    states = {client_id: store.get(client_id) for client_id in store.clients()}
    return {client_id: int(state["router"][0]) for client_id, state in states.items() if state is not None}


def played(store: PrivateStore, rounds: Iterable[int], cohort: Callable[[int], list[Any]]) -> PrivateStore:
    """After a round, each of its clients holds the round's number."""
    for round in rounds:
        for client_id in cohort(round):
            store.put(client_id, round, value(round))
        store.commit()
    return store


def test_a_client_gets_back_what_it_stored_last(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    assert store.get("a") is None
    played(store, (1, 3), lambda round: ["a"])
    assert numbers(store) == {"a": 3}
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool])
def test_what_is_written_are_the_bytes_of_safetensors(dtype: torch.dtype) -> None:
    whole = torch.arange(6).view(2, 3).to(dtype)
    state = {"b": whole.t(), "a": torch.tensor(1).to(dtype), "none": whole[:0]}
    if dtype.is_floating_point:
        state["trained"] = whole.clone().requires_grad_()
    plain = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    assert store._record(state) == save(plain)


def test_until_a_round_is_committed_the_state_before_it_counts(tmp_path: Path) -> None:
    store = played(PrivateStore(tmp_path), [1], lambda round: ["a"])
    store.put("a", 2, value(2.0))
    store.put("b", 2, value(2.0))
    assert numbers(store) == {"a": 1}
    store.rollback()
    store.commit()
    assert numbers(store) == {"a": 1}
    assert len(files(tmp_path)) == 1


def test_a_round_is_one_file_and_a_repeated_client_counts_once(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    clients: list[Any] = ["a", "b", "a", 1, "1"]
    for number, client_id in enumerate(clients):
        store.put(client_id, 1, value(number))
    store.commit()
    assert numbers(store) == {"a": 2, "b": 1, 1: 3, "1": 4}
    assert len(files(tmp_path)) == 1


def test_a_checkpoints_state_comes_back_and_what_it_needs_is_kept_as_long_as_it_is_there(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    played(store, (1, 2), lambda round: ["a", "b"] if round == 1 else ["b", "c"])
    saved = {2: store.snapshot(2)}
    for round in (3, 4, 5):
        for client_id in ("a", "c", "d"):
            store.put(client_id, round, value(round))
        store.commit()
    again = PrivateStore(tmp_path)
    again.restore(saved[2], saved)
    assert numbers(again) == {"a": 1, "b": 2, "c": 2}
    again.sweep()
    assert sorted(path.name for path in files(tmp_path)) == sorted(saved[2])
    played(again, [3], lambda round: ["a", "b", "c"])
    assert numbers(again) == {"a": 3, "b": 3, "c": 3}
    assert len(files(tmp_path)) == 1 + len(saved[2])
    again.keep([])
    assert len(files(tmp_path)) == 1


def test_a_restored_store_forgets_what_came_later(tmp_path: Path) -> None:
    store = played(PrivateStore(tmp_path), (1, 2, 3), lambda round: ["a"])
    store.put("b", 4, value(4.0))  # a killed round
    again = PrivateStore(tmp_path)
    assert again.holds_any()
    again.restore()
    assert again.holds_any()  # until the sweep, a crash costs nothing
    again.sweep()
    assert files(tmp_path) == []
    assert list(again.clients()) == []


def test_sweeping_touches_no_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    for name in ("ab/letter.txt", "letter.txt"):
        (tmp_path / name).write_text("mine")
    PrivateStore(tmp_path).sweep()
    assert (tmp_path / "ab" / "letter.txt").read_text() == (tmp_path / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize(("population", "cohort"), [(100, 100), (1000, 20), (30, 1)])
def test_files_do_not_grow_with_the_rounds(tmp_path: Path, population: int, cohort: int, checkpoints: bool) -> None:
    rng = np.random.default_rng(0)
    store, last, sizes = PrivateStore(tmp_path), {}, []
    for round in range(1, 101):
        # Some clients come often, the others hardly ever.
        chosen = np.unique((population * rng.random(cohort) ** 3).astype(int)).tolist()
        for client_id in chosen:
            store.put(client_id, round, value(round))
        last.update(dict.fromkeys(chosen, round))
        store.commit()
        if checkpoints:
            store.snapshot(round)
            store.keep([round])
        sizes.append(sum(path.stat().st_size for path in files(tmp_path)) / len(last))
    assert numbers(store) == last
    record = len(save(value(0.0))) + 100
    assert max(sizes) < (5 if checkpoints else 2.5) * record + 200 / cohort
    again = PrivateStore(tmp_path)
    again.restore(store.snapshot(100))
    assert numbers(again) == last


def test_a_commit_costs_no_more_where_many_clients_have_trained(tmp_path: Path, monkeypatch: Any) -> None:
    written: list[int] = []
    monkeypatch.setattr(SegmentDraft, "add", counted(SegmentDraft.add, written))
    rng = np.random.default_rng(0)
    played(PrivateStore(tmp_path), range(1, 400), lambda round: rng.choice(2000, 10, replace=False).tolist())
    assert len(written) < 2 * 10 * 400


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return wrapped


def damages(content: bytes, step: int) -> Iterator[bytes]:
    """Cut off at every length, and one bit flipped in every byte, every `step` bytes."""
    for position in range(0, len(content), step):
        yield content[:position]
        flipped = bytes([content[position] ^ (1 << position % 8)])
        yield content[:position] + flipped + content[position + 1 :]
    yield content + b"\0"


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_file_is_an_error_and_never_a_new_client(tmp_path: Path, step: int) -> None:
    store = played(PrivateStore(tmp_path), [1], lambda round: ["hamlet", "ophelia"])
    names = store.snapshot(1)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    for damaged in damages(content, step):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"damaged"):
            again = PrivateStore(tmp_path)
            again.restore(names)
            numbers(again)
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        PrivateStore(tmp_path).restore(names)
    with pytest.raises(StoreError, match=r"client 'hamlet': .* cannot be read: No such file"):
        store.get("hamlet")


@pytest.mark.parametrize(
    "index",
    [
        b"[1]",
        b"{}x",
        b'[["a", 0, 1000000000000, ""]]',
        b'[["a", -5, 3, ""]]',
        b"[[[], 0, 1, 2]]",
        b'[["a", 0, 0.0, ""]]',
        b"[" * 100_000,
    ],
)
def test_an_index_that_lies_is_damage_and_costs_no_memory(tmp_path: Path, index: bytes) -> None:
    path = tmp_path / f"1-{digest(index)}.segment"
    path.write_bytes(b"record" + index + len(index).to_bytes(8, "little"))
    with pytest.raises(StoreError, match="is damaged"):
        PrivateStore(tmp_path).restore([path.name])
    path.write_bytes(b"record" + index + (2**62).to_bytes(8, "little"))
    with pytest.raises(StoreError, match="is damaged"):
        PrivateStore(tmp_path).restore([path.name])


HOSTILE: list[Any] = [
    "../x",
    "/etc/x",
    "a\0b",
    "a\nb",
    "x" * 300,
    "con",
    "",
    "caf\u00e9",
    "cafe\u0301",
    "\ud800",
    -5,
    2**70,
]


def test_any_id_is_safe_as_a_name(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path / "private")
    for number, client_id in enumerate(HOSTILE):
        store.put(client_id, 1, value(number))
    store.commit()
    expected = {client_id: number for number, client_id in enumerate(HOSTILE)}
    again = PrivateStore(tmp_path / "private")
    again.restore(store.snapshot(1))
    assert numbers(store) == numbers(again) == expected
    assert [path.parent for path in files(tmp_path)] == [tmp_path / "private"]


def test_a_name_in_a_checkpoint_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    played(PrivateStore(tmp_path / "other"), [1], lambda round: ["a"])
    (path,) = files(tmp_path)
    with pytest.raises(StoreError, match="No such file"):
        PrivateStore(tmp_path / "private").restore([f"../other/{path.name}"])


def test_a_client_without_private_tensors_leaves_no_file(tmp_path: Path) -> None:
    PrivateStore(tmp_path).put("a", 1, {})
    assert files(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == [path]


def test_processes_that_were_killed_while_writing_leave_one_file_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid in (7, 8, 9):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        Draft(tmp_path / "file").write(b"torn")
    assert len(files(tmp_path)) == 1
    write_file(tmp_path / "file", b"whole")
    assert files(tmp_path) == [tmp_path / "file"]


RUN = {"method": "floral", "seed": 1}
STATE = ServerState(
    round=3,
    tensors={"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.tensor([1.5])},
    optimizer={"layer.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3), "momentum_buffer": None}},
)
SAVED = Checkpoint(STATE, ["3-abc.segment"], {"best": 2})


def test_a_checkpoint_gives_the_state_back(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, SAVED, RUN)
    assert folder == tmp_path / "checkpoint-3"
    checkpoint = load_checkpoint(folder, STATE, RUN)
    assert (checkpoint.private, checkpoint.trainer) == (["3-abc.segment"], {"best": 2})
    loaded = checkpoint.server
    assert loaded.round == 3
    assert all(torch.equal(loaded.tensors[name], STATE.tensors[name]) for name in STATE.tensors)
    memory = loaded.optimizer["layer.weight"]
    assert torch.equal(memory["exp_avg"], torch.ones(2, 3))
    assert memory["step"].item() == 3.0
    assert memory["momentum_buffer"] is None


def test_a_checkpoint_without_its_manifest_does_not_exist(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, SAVED, RUN)
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    assert checkpoint_rounds(tmp_path) == []
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path, True)


@pytest.mark.parametrize("name", ["server/tensors.safetensors", "server/optimizer.safetensors", "server/state.json"])
def test_a_damaged_checkpoint_is_an_error(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, SAVED, RUN)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match=f"damaged.*{name}"):
        load_checkpoint(folder, STATE, RUN)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_checkpoint(folder, STATE, RUN)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": {}}', b"\x80\x04."])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, content: bytes) -> None:
    folder = save_checkpoint(tmp_path, SAVED, RUN)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_checkpoint(folder, STATE, RUN)


def test_a_checkpoint_of_another_model_or_method_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, SAVED, RUN)
    with pytest.raises(CheckpointError, match="is of another run: method was 'floral', now it is 'fedavg'"):
        load_checkpoint(folder, STATE, {**RUN, "method": "fedavg"})
    with pytest.raises(CheckpointError, match=r"another model.*'layer\.bias'"):
        load_checkpoint(folder, ServerState(0, {"layer.weight": torch.zeros(2, 3)}), RUN)
    other = ServerState(0, {**STATE.tensors, "layer.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"layer\.bias is \(1,\), expected \(2,\)"):
        load_checkpoint(folder, other, RUN)


def test_the_newest_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    for round in (9, 10, 2):
        save_checkpoint(tmp_path, Checkpoint(ServerState(round, STATE.tensors)), RUN)
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-x").write_text("")
    assert checkpoint_rounds(tmp_path) == [2, 9, 10]
    assert find_checkpoint(tmp_path, True).name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "true").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, tmp_path / "checkpoint-9").name == "checkpoint-9"


def test_a_checkpoint_of_another_folder_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "a", SAVED, RUN)
    with pytest.raises(CheckpointError, match="is not in output_dir"):
        find_checkpoint(tmp_path / "b", str(folder))
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        find_checkpoint(tmp_path / "a", str(tmp_path / "a" / "checkpoint-4"))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for round in (1, 2, 3):
        save_checkpoint(tmp_path, Checkpoint(ServerState(round, STATE.tensors)), RUN)
    prune_checkpoints(tmp_path, None)
    assert checkpoint_rounds(tmp_path) == [1, 2, 3]
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, SAVED, RUN)
    played(PrivateStore(tmp_path / "private"), [1], lambda round: ["a"])
    assert {path.suffix for path in files(tmp_path)} == {".safetensors", ".json", ".segment"}
    assert not any(b"\x80\x04" in path.read_bytes() for path in files(tmp_path))
    assert json.loads((tmp_path / "checkpoint-3" / "server" / "state.json").read_text())["round"] == 3
