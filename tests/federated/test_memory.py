"""What a training step frees serves the next one, without the system's help."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from floral_peft.federated import clients as clients_module
from floral_peft.federated import memory
from floral_peft.federated.memory import keep_freed_memory

from .clients import trainer


#: In a process without anything else, whose heap holds nothing above these blocks.
FAULTS = """
import ctypes, resource, runpy, sys

kept = runpy.run_path(sys.argv[1])["keep_freed_memory"]()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def step():
    held = [library.malloc(2**22) for _ in range(30)]
    for block in held:
        ctypes.memset(block, 1, 2**22)
    for block in held:
        library.free(block)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def nobody_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES"):
            monkeypatch.delenv(name)


def faults(**environment: str) -> tuple[bool, int]:
    """Whether freed memory is kept, and the pages that the system had to give in five steps."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", FAULTS, memory.__file__],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_steps_take_what_the_last_one_freed() -> None:
    kept, count = faults()
    assert kept
    tuned, more = faults(MALLOC_PERTURB_="0")  # somebody else sees to it
    assert not tuned
    assert count < more / 10, (count, more)


def test_training_on_a_cpu_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(clients_module, "keep_freed_memory", lambda: asked.append(True))
    run = trainer(tmp_path, rounds=1)
    assert not asked
    run.train()
    assert asked


@pytest.mark.parametrize(
    "environment", [{"MALLOC_ARENA_MAX": "1"}, {"LD_PRELOAD": "other.so"}, {"GLIBC_TUNABLES": "glibc.malloc.check=1"}]
)
def test_who_tunes_the_allocator_is_not_disturbed(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("asked"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


class Library:
    """A C library that notes what it is asked for."""

    def __init__(self, refused: int | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.refused = refused

    def gnu_get_libc_version(self) -> bytes:
        return b"2.17"

    def mallopt(self, number: int, value: int) -> int:
        self.asked.append((number, value))
        return int(number != self.refused)


@pytest.mark.parametrize(("refused", "asked"), [(None, [-3, -1]), (-3, [-3])])
def test_what_is_asked_of_glibc(monkeypatch: pytest.MonkeyPatch, refused: int | None, asked: list[int]) -> None:
    library = Library(refused)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0")  # another matter
    assert keep_freed_memory() is (refused is None)
    assert [number for number, _ in library.asked] == asked


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: None) -> None:
        raise OSError("a static program")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()  # another C library
    monkeypatch.setattr(ctypes, "CDLL", fails)
    assert not keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("asked"))
    assert not keep_freed_memory()
