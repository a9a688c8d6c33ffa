"""Memory that a training step has freed serves the next one, without a detour by the system."""

from __future__ import annotations

import ctypes
import os
import sys


#: mallopt's numbers for M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
_TRIM, _MMAP = -1, -3
#: Bytes of the largest block that comes from the heap: the most to which glibc moves this bound by itself.
_LARGEST = 2**25
#: Bytes at the end of the heap that may be free before they are given back.
_FREE = 2**28


def keep_freed_memory() -> bool:
    """Have glibc give memory back to the system when 256 MB at the heap's end are free, and not sooner.

    Clients that train side by side need the same tensors of tens of megabytes in every step. By default glibc gives
    them back as soon as the heap ends in twice the largest of them, and fetches them again, and the system zeroes
    every page. On a CPU that takes a good part of a round (`benchmarks/engine.py --parts memory`).

    Who has tuned the allocator is not disturbed: where an environment variable that begins with `MALLOC_` is set, or
    `LD_PRELOAD`, or `GLIBC_TUNABLES` with a setting of malloc, nothing is done.

    Returns:
        Whether it does so now; not without glibc.
    """
    tuned = any(value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "LD_PRELOAD")
    if tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version  # not in other C libraries
        # Both or none: once one is set glibc no longer moves the other, which begins at 128 KB.
        return bool(library.mallopt(_MMAP, _LARGEST)) and bool(library.mallopt(_TRIM, _FREE))
    except (AttributeError, OSError):
        return False
