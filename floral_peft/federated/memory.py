"""Memory that a process has freed stays with it, so that the next step need not ask the system for the same again."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache


#: mallopt's numbers for M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
_TRIM, _MMAP = -1, -3
#: Bytes of the largest block that is taken from what was freed, if the C library allows it; all allow the second.
LARGEST = (2**28, 2**25)
#: Bytes of freed memory that stay.
KEPT = 2**30
#: Who sets one of these tunes memory, and is not to be disturbed.
TUNED_BY = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Have the C library keep up to a gigabyte of what the process frees.

    Clients that train side by side need the same few tensors of tens of megabytes in every step. glibc hands blocks of
    that size back to the system and fetches them again, and the system zeroes every page of them. On a CPU that may
    take as long as the arithmetic (`benchmarks/engine.py --parts memory`).

    Returns:
        Whether it does now: not without glibc, nor where one of the environment variables in `TUNED_BY` is set.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in TUNED_BY):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # The first alone would do harm: a fixed threshold for trimming makes the other one fixed at 128 KB.
    return any(library.mallopt(_MMAP, size) for size in LARGEST) and bool(library.mallopt(_TRIM, KEPT))
