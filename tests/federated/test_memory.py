"""What a training step frees serves the next one, without the system's help."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from floral_peft.federated import memory


FAULTS = """
import resource
import torch
from floral_peft.federated.memory import keep_freed_memory

kept = keep_freed_memory()

def step():
    held = [torch.ones(12_000_000) for _ in range(3)]  # 48 MB each

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    """Whether freed memory is kept, and the pages that the system had to give in five steps."""
    clean = {name: value for name, value in os.environ.items() if name not in memory.TUNED_BY}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", FAULTS], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's allocator only")
def test_steps_take_what_the_last_one_freed() -> None:
    pages = 5 * 3 * 48_000_000 // os.sysconf("SC_PAGESIZE")
    kept, count = faults()
    assert kept and count < pages / 100
    kept, count = faults(GLIBC_TUNABLES="glibc.malloc.check=0")  # somebody else sees to it
    assert not kept and count > pages / 100


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = memory.keep_freed_memory.__wrapped__
    for name in memory.TUNED_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not ask()  # no glibc
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not ask()


def test_an_older_library_keeps_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        gnu_get_libc_version = "2.17"

        @staticmethod
        def mallopt(number: int, value: int) -> int:
            asked.append((number, value))
            return int(number == -1 or value <= 2**25)

    for name in memory.TUNED_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert memory.keep_freed_memory.__wrapped__()
    assert asked == [(-3, 2**28), (-3, 2**25), (-1, 2**30)]
