"""Several processes: the same bits as one, and an end for all when one of them ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from floral_peft.federated.processes import Processes, deal, pack_states, unpack_states

from . import worker


CONTEXT = multiprocessing.get_context("forkserver")  # imports the libraries once, for all processes of all tests
CONTEXT.set_forkserver_preload([worker.__name__])
PATIENCE = 60


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def launch(count: int, folder: Path, **options: Any) -> list[int | None]:
    """Train in that many processes; returns their exit codes, None for one that was still there at the end."""
    port = free_port()
    arguments = (count, port, str(folder), json.dumps(options))
    running = [CONTEXT.Process(target=worker.start, args=(rank, *arguments)) for rank in range(count)]
    for process in running:
        process.start()
    deadline = time.monotonic() + PATIENCE
    hangs = options.get("misfortune", [None, None])[:2]
    waited_for = [process for rank, process in enumerate(running) if hangs != ["hang", rank]]
    for process in waited_for:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
        process.join()
    return codes


def result(folder: Path, rank: int, count: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    name = f"{folder}-{rank}-of-{count}"
    return load_file(f"{name}.safetensors"), json.loads(Path(f"{name}.json").read_text())


def assert_same(one: Any, other: Any) -> None:
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes of the training."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert launch(1, folder) == [0]
    return result(folder, 0, 1)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_give_the_bits_of_one(tmp_path: Path, alone: Any, count: int) -> None:
    assert launch(count, tmp_path / "run") == [0] * count
    for rank in range(count):
        assert_same(result(tmp_path / "run", rank, count), alone)


def test_chunks_that_train_side_by_side_are_dealt_out_whole(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cohort": "vectorized", "chunk_clients": 2, "rounds": 2}
    assert launch(1, tmp_path / "run", **settings) == [0]
    assert launch(2, tmp_path / "shared", **settings) == [0, 0]
    for rank in range(2):
        assert_same(result(tmp_path / "shared", rank, 2), result(tmp_path / "run", 0, 1))


def test_a_run_goes_on_with_another_number_of_processes_and_keeps_its_bits(tmp_path: Path, alone: Any) -> None:
    folder = tmp_path / "run"
    assert launch(1, folder, misfortune=["stop", 0, 1], save_steps=1, eval_steps=None) == [0]
    assert launch(2, folder, misfortune=["stop", 0, 2], save_steps=1, resume=True) == [0, 0]
    assert launch(1, folder, resume=True) == [0]
    assert_same(result(folder, 0, 1), alone)


def test_a_clients_failure_in_any_process_costs_its_update_only(tmp_path: Path) -> None:
    for count in (1, 2):
        assert launch(count, tmp_path / str(count), broken=True, clients_per_round=8) == [0] * count
    assert_same(result(tmp_path / "2", 1, 2), result(tmp_path / "1", 0, 1))
    records = result(tmp_path / "2", 0, 2)[1]["records"]
    assert records[0]["clients_dropped"] == {"broken": "IndexError"}


def test_routers_that_are_relearned_are_those_of_one_process(tmp_path: Path) -> None:
    for count in (1, 2):
        assert launch(count, tmp_path / str(count), stateless=True, rounds=2) == [0] * count
    assert_same(result(tmp_path / "2", 1, 2), result(tmp_path / "1", 0, 1))


@pytest.mark.parametrize("cohort", [pytest.param("loop", marks=pytest.mark.slow), "vectorized"])
def test_the_posterior_s_search_is_that_of_one_process_also_where_their_number_changes(
    tmp_path: Path, cohort: str
) -> None:
    settings: dict[str, Any] = {"router_update": "posterior", "rounds": 20, "cohort": cohort, "chunk_clients": 2}
    assert launch(1, tmp_path / "one", **settings) == [0]
    folder = tmp_path / "several"
    assert launch(2, folder, misfortune=["stop", 0, 8], **settings) == [0, 0]
    assert launch(1, folder, misfortune=["stop", 0, 14], resume=True, **settings) == [0]
    assert launch(2, folder, resume=True, **settings) == [0, 0]
    assert_same(result(folder, 1, 2), result(tmp_path / "one", 0, 1))
    records = result(tmp_path / "one", 0, 1)[1]["records"]
    dropped = [drop["adaptor"] for record in records for drop in record.get("pruned") or ()]
    assert len(dropped) >= 5  # of seven adaptors that searched


@pytest.mark.parametrize("kind", ["kill", "raise"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_ends_ends_all_and_the_run_resumes(tmp_path: Path, alone: Any, kind: str, rank: int) -> None:
    folder = tmp_path / "run"
    codes = launch(2, folder, misfortune=[kind, rank, 3])
    assert codes[rank] == (-9 if kind == "kill" else 1)
    assert codes[1 - rank] == 1
    assert launch(2, folder, resume=True) == [0, 0]
    assert_same(result(folder, 1, 2), alone)


def test_a_process_that_hangs_ends_the_others_within_the_timeout(tmp_path: Path) -> None:
    began = time.monotonic()
    codes = launch(2, tmp_path / "run", misfortune=["hang", 1, 2], ddp_timeout=3)
    assert codes[0] == 1
    assert time.monotonic() - began < 20


def test_too_few_clients_are_an_error_of_every_process(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"broken": True, "clients_per_round": 8, "min_clients": 8}
    assert launch(2, tmp_path / "run", **settings) == [1, 1]


def test_a_callback_of_the_main_process_decides(tmp_path: Path) -> None:
    for rank, last in ((0, 2), (1, 4)):
        folder = tmp_path / str(rank)
        assert launch(2, folder, misfortune=["stop", rank, 2]) == [0, 0]
        assert [result(folder, k, 2)[1]["round"] for k in (0, 1)] == [last, last]


def test_only_the_main_process_needs_the_output_folder(tmp_path: Path, alone: Any) -> None:
    assert launch(2, tmp_path / "run", elsewhere=True) == [0, 0]
    assert_same(result(tmp_path / "run", 0, 2), alone)
    assert not (tmp_path / "run-elsewhere").exists()


def torchrun(*words: str) -> int:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run([sys.executable, "-m", *words], env=environment, timeout=120).returncode  # noqa: S603


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["torch.distributed.run"], ["accelerate.commands.launch", "--multi_gpu"]])
def test_the_command_line_trains_in_several_processes(tmp_path: Path, launcher: list[str]) -> None:
    count = "--num_processes" if "accelerate" in launcher[0] else "--nproc_per_node"
    train = ["-m", "floral_peft", "train", "--rounds", "2", "--eval_steps", "2", "--disable_tqdm"]
    for processes in ("1", "2"):
        start = launcher if processes == "2" else ["torch.distributed.run"]
        flag = count if processes == "2" else "--nproc_per_node"
        assert torchrun(*start, flag, processes, *train, "--output_dir", str(tmp_path / processes)) == 0
    for method, file in (("floral", "adapter/adapter_model.safetensors"), ("fedavg", "model/model.safetensors")):
        one, two = (load_file(tmp_path / processes / method / file) for processes in ("1", "2"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


# Without a second process


def test_jobs_are_dealt_out_longest_first() -> None:
    assert deal([1, 9, 4, 4, 2], 2) == [[0, 1], [2, 3, 4]]
    assert deal([5, 5, 5], 3) == [[0], [1], [2]]
    assert deal([], 2) == [[], []]


def test_states_keep_their_names_values_and_ids() -> None:
    shared = torch.arange(3.0)
    states: Any = [("a", {"x/1": shared, "": torch.zeros(())}), (1, {}), ("1", {"x/1": shared})]
    found = list(unpack_states(pack_states(states)))
    assert [value for value, _ in found] == ["a", 1, "1"]
    assert found[0][1].keys() == {"x/1", ""}
    assert torch.equal(found[2][1]["x/1"], shared)


def test_one_process_tells_itself_everything_at_once() -> None:
    alone = Processes()
    assert alone.collect({"a": 1}) == [{"a": 1}]
    assert alone.on_main(lambda: None) == (None, {})
    with pytest.raises(OSError, match="disk"):
        alone.on_main(lambda: (_ for _ in ()).throw(OSError("disk")))
