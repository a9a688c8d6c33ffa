"""Seeds that depend on names, not on history: what a client draws is the same whoever ran before it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


#: A client is named by a string or an int, as in `{"hamlet": ...}` or `{0: ...}`.
ClientId = str | int


def derive_seed(seed: int, *path: str | int) -> int:
    """A 32-bit seed for one purpose, from the run's seed and the purpose's name.

    Args:
        seed: The run's seed.
        path: What the seed is for, for example `"client", 3, "hamlet"`.

    Returns:
        An int in [0, 2³²), the same on every machine and in every process.
    """
    text = json.dumps([seed, *path])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global random generators: Python's, NumPy's, PyTorch's of CPU and device.

    As transformers' `set_seed`, but that seeds every kind of device, and notes where from, at some cost a client.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Afterwards the global random generators are where they were: Python's, NumPy's, PyTorch's of CPU and device."""
    python, numpy = random.getstate(), np.random.get_state()
    kind = None if device.type in ("cpu", "mps") else device.type
    try:
        with torch.random.fork_rng(devices=[device.index or 0] if kind else [], device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
