"""Kills, full disks, damage and malice: every run goes on from its newest checkpoint, and ends as if nothing was."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from floral_peft.federated import CheckpointError, OutputDirInUseError, ServerState, StoreError, lock
from floral_peft.federated.checkpoint import (
    Checkpoint,
    checkpoint_rounds,
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from floral_peft.federated.files import digest
from floral_peft.federated.lock import locked

from .clients import population, tensors, trainer
from .faults import Disk, Killed
from .test_store import damages


SETTINGS: dict[str, Any] = {
    "rounds": 3,
    "clients_per_round": 2,
    "local_steps": 1,
    "router_learning_rate": 5.0,
    "server_optimizer": "adam",
    "server_learning_rate": 0.01,
    "cohort": "loop",
    "save_steps": 1,
    "save_total_limit": 1,
}


def run(folder: Path, **settings: Any) -> Any:
    return trainer(folder, dataset=population(3, num_examples=4), **(SETTINGS | settings))


def outcome(folder: Path, done: Any) -> dict[str, Any]:
    """All that a run leaves: weights, mixtures, records but for the time, and which files."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return {
        "tensors": {name: value.tolist() for name, value in tensors(done.model).items()},
        "mixtures": done.mixtures()[1].tolist(),
        "records": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock"),
    }


def finish(folder: Path) -> dict[str, Any]:
    """Go on after a crash, as a user would."""
    resume = bool(checkpoint_rounds(folder))
    again = run(folder, overwrite_output_dir=not resume)
    again.train(resume_from_checkpoint=resume)
    return outcome(folder, again)


def points(folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Iterator[int]]:
    """What an untroubled run leaves, and at which of its changes to the disk to trouble another."""
    whole = run(folder)
    with monkeypatch.context() as patched:
        disk = Disk().install(patched)
        whole.train()
    return outcome(folder, whole), iter(range(0, disk.count, step))


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_change_to_the_disk_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    expected, where = points(tmp_path / "whole", step, monkeypatch)
    for at in where:
        folder = tmp_path / str(at)
        events: list[str] = []
        cut = run(folder)
        monkeypatch.setattr(cut, "_event", noting(cut._event, events))
        with monkeypatch.context() as patched, pytest.raises(Killed):
            Disk(at).install(patched)
            cut.train()
        assert checkpoint_rounds(folder) or not events, f"no checkpoint after a kill at {at}"
        assert finish(folder) == expected, f"killed at {at}"


def noting(event: Any, events: list[str]) -> Any:
    """The trainer's events, noting those that follow a checkpoint."""

    def wrapped(name: str, *given: Any) -> None:
        if name == "on_save":
            events.append(name)
        event(name, *given)

    return wrapped


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_is_told_and_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    expected, where = points(tmp_path / "whole", step, monkeypatch)
    for at in where:
        folder = tmp_path / str(at)
        cut = run(folder)
        with monkeypatch.context() as patched:
            Disk(at, full=True).install(patched)
            try:
                cut.train()
            except (StoreError, CheckpointError) as error:
                assert "No space left on device" in str(error)
            except OSError as error:  # of the records
                assert error.errno == 28
        assert finish(folder) == expected, f"full at {at}"


def test_a_full_disk_in_a_round_leaves_the_clients_and_the_server_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(tmp_path, rounds=1)
    done.train()
    before, mixtures = tensors(done.model), done.mixtures()[1]
    more = run(tmp_path, rounds=2)
    monkeypatch.setattr(more._store, "put", full(more._store.put))
    with pytest.raises(StoreError, match=r"private state cannot be written.*No space left on device.*make room"):
        more.train(resume_from_checkpoint=True)
    assert torch.equal(more.mixtures()[1], mixtures)
    assert all(torch.equal(before[name], value) for name, value in tensors(more.model).items())
    assert not list((tmp_path / "private").glob(".*"))


def full(put: Any) -> Any:
    def wrapped(*given: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            Disk(0, full=True).install(patched)
            put(*given)

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 30, 55, 80])
def test_a_process_killed_by_the_system_is_no_different(tmp_path: Path, at: int) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import pytest\n"
        "from tests.federated.faults import Disk, Killed\n"
        "from tests.federated.test_faults import run\n"
        "class Dies(Disk):\n"
        "    def _counted(self, name, function):\n"
        "        inner = super()._counted(name, function)\n"
        "        def wrapped(*given):\n"
        "            try:\n"
        "                return inner(*given)\n"
        "            except Killed:\n"
        "                os.kill(os.getpid(), 9)\n"
        "        return wrapped\n"
        f"Dies({at}).install(pytest.MonkeyPatch())\n"
        "run(Path(sys.argv[1])).train()\n"
    )
    whole = run(tmp_path / "whole")
    whole.train()
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path / "cut")], check=False)  # noqa: S603
    assert died.returncode == -signal.SIGKILL
    assert finish(tmp_path / "cut") == outcome(tmp_path / "whole", whole)


# Damage


RUN = {"method": "floral"}
STATE = ServerState(2, {"w": torch.arange(6.0).view(2, 3)}, {"w": {"step": torch.tensor(2.0), "m": torch.ones(2, 3)}})
FILES = ["manifest.json", "server/state.json", "server/tensors.safetensors", "server/optimizer.safetensors"]


def saved(folder: Path) -> Path:
    return save_checkpoint(folder, Checkpoint(STATE, ["2-ab.segment"]), RUN)


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_damaged_anywhere_is_an_error(tmp_path: Path, name: str, step: int) -> None:
    folder = saved(tmp_path)
    content = (folder / name).read_bytes()
    for damaged in damages(content, step):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|not a complete checkpoint"):
            load_checkpoint(folder, STATE, RUN)
    (folder / name).write_bytes(content)
    assert load_checkpoint(folder, STATE, RUN).server.round == 2


def test_a_damaged_store_ends_a_resumed_run_before_anything_is_deleted(tmp_path: Path) -> None:
    run(tmp_path).train()
    segment = min((tmp_path / "private").iterdir())
    content = segment.read_bytes()
    segment.write_bytes(content[:-1])
    everything = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="is damaged"):
        run(tmp_path, rounds=4).train(resume_from_checkpoint=True)
    segment.unlink()
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        run(tmp_path, rounds=4).train(resume_from_checkpoint=True)
    segment.write_bytes(content)
    assert sorted(tmp_path.rglob("*")) == everything
    run(tmp_path, rounds=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("line", [b"{", b"[]", b"5", b"\xff", b"{}", b'{"round": "x"}', b"[" * 100_000])
def test_damaged_records_cost_themselves_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    run(tmp_path).train()
    path = tmp_path / "records.jsonl"
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, third]) + b"\n")
    again = run(tmp_path, rounds=4)
    again.train(resume_from_checkpoint=True)
    assert [record["round"] for record in again.records] == [1, 4]
    assert "records.jsonl: line 2 of 3 is damaged" in caplog.text


def test_a_damaged_older_checkpoint_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, save_total_limit=2).train()
    (tmp_path / "checkpoint-2" / "server" / "state.json").write_bytes(b"")
    assert run(tmp_path, rounds=4, save_total_limit=2).train(resume_from_checkpoint=True).global_step == 4
    assert "checkpoint-2 is damaged" in caplog.text


def test_an_incomplete_checkpoint_of_a_killed_run_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path).train()
    for folder in ("checkpoint-7", "checkpoint-8"):
        (tmp_path / folder / "server").mkdir(parents=True)
        (tmp_path / folder / "server" / ".tensors.safetensors.7.tmp").write_bytes(b"torn")
        (tmp_path / folder / ".manifest.json.7.tmp").write_bytes(b"torn")
    (tmp_path / "checkpoint-8" / "notes.txt").write_text("mine")
    run(tmp_path, rounds=4).train(resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-7").exists()
    assert [path.name for path in (tmp_path / "checkpoint-8").iterdir()] == ["notes.txt"]


def test_the_best_checkpoint_is_spared(tmp_path: Path) -> None:
    for round in (1, 2, 3, 4):
        save_checkpoint(tmp_path, Checkpoint(ServerState(round, STATE.tensors)), RUN)
    prune_checkpoints(tmp_path, 2, spare=[1])
    assert checkpoint_rounds(tmp_path) == [1, 4]
    prune_checkpoints(tmp_path, 1, spare=[1])
    assert checkpoint_rounds(tmp_path) == [1, 4]


# Malice


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "model.pth", "state.pkl", "last.ckpt"])
def test_a_pickle_is_refused_by_name_and_never_opened(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    for offered in (folder, folder / name):
        with pytest.raises(CheckpointError, match=f"{name} may run any code when it is loaded"):
            find_checkpoint(tmp_path, offered)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path, True)


def forged(folder: Path, name: str, content: bytes) -> Path:
    """A checkpoint with another file in it, and a manifest to match."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": digest(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def header(text: str, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()


LIES: list[tuple[str, bytes]] = [
    ("server/tensors.safetensors", pickle.dumps(Bomb())),
    ("server/optimizer.safetensors", pickle.dumps(Bomb())),
    ("server/state.json", pickle.dumps(Bomb())),
    ("server/tensors.safetensors", header("{}", length=2**60)),
    (
        "server/tensors.safetensors",
        header('{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
    ),
    ("server/tensors.safetensors", header('{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}')),
    ("server/tensors.safetensors", save({"w": torch.zeros(2, 3, dtype=torch.float64)})),
    ("server/optimizer.safetensors", save({"0": torch.zeros(3)})),
    ("server/state.json", b"[" * 100_000),
    ("server/state.json", b"[]"),
    ("server/state.json", b'{"run": {"method": "floral"}, "round": "x"}'),
    ("server/state.json", b'{"run": {"method": "floral"}, "round": Infinity}'),
    ("server/state.json", b'{"run": {"method": "floral"}, "round": 99}'),
    ("server/state.json", b'{"run": {"method": "floral"}, "round": 2, "optimizer_tensors": [["v", "m"]]}'),
]


@pytest.mark.parametrize(("name", "content"), LIES)
def test_a_forged_checkpoint_is_an_error_without_harm(tmp_path: Path, name: str, content: bytes) -> None:
    folder = forged(saved(tmp_path), name, content)
    with pytest.raises(CheckpointError, match=r"damaged|another model"):
        load_checkpoint(folder, STATE, RUN)


def test_a_manifest_cannot_lead_to_other_files(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "manifest.json").write_text(json.dumps({"files": {"../../secret": {"size": 0, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_checkpoint(folder, STATE, RUN)


# One trainer in a folder


def test_a_second_trainer_in_the_folder_is_refused_while_the_first_trains(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(OutputDirInUseError, match=f"run' is in use: process {os.getpid()} on .* is training there"),
    ):
        run(tmp_path / "run").train()
    assert not (tmp_path / "run").exists()  # nothing was put into it
    run(tmp_path / "run").train()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("below", [(), ("run",)])
def test_an_output_dir_that_is_a_file_or_in_one_is_refused_by_name(tmp_path: Path, below: tuple[str, ...]) -> None:
    (file := tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"output_dir=.*notes.txt' is a file\. Choose another"):
        trainer(file.joinpath(*below)).train()
    assert file.read_text() == "mine"


def test_the_lock_goes_with_its_holder_however_that_dies(tmp_path: Path) -> None:
    script = (
        "import runpy, sys, time\n"
        "from pathlib import Path\n"
        "with runpy.run_path(sys.argv[1])['locked'](Path(sys.argv[2])):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(lock.__file__), str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(OutputDirInUseError, match=f"process {holder.pid} on"), locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path):
        pass


# A long run


@pytest.mark.slow
def test_five_hundred_rounds_of_a_hundred_clients_leave_memory_and_files_flat(tmp_path: Path) -> None:
    done = trainer(
        tmp_path,
        dataset=population(200, num_examples=4),
        **(SETTINGS | {"rounds": 500, "clients_per_round": 100, "save_steps": 10}),
    )
    seen: list[tuple[int, int, int]] = []
    event = done._event

    def watching(name: str, *given: Any) -> None:
        event(name, *given)
        if name == "on_save":
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages, len(os.listdir("/proc/self/fd")), len(list(tmp_path.rglob("*")))))

    done._event = watching
    done.train()
    settled, last = seen[len(seen) // 4], seen[-1]
    assert (last[0] - settled[0]) * os.sysconf("SC_PAGE_SIZE") < 20 * 2**20
    assert last[1] <= settled[1]
    assert last[2] <= settled[2] + 5
