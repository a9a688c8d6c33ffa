"""A disk that fails at one operation: by a kill, after which nothing happens any more, or for want of room."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from floral_peft.federated import files, records


class Killed(BaseException):
    """The process is dead: whatever would clean up after it cannot."""


class Disk:
    """Stands in for `os` where files are written, and counts what changes the disk.

    Args:
        at: The operation, from 0, at which it fails; None: it only counts.
        full: Fail for want of room, and only there, instead of dying there.
    """

    CHANGES = ("write", "fsync", "replace", "unlink", "rmdir")

    def __init__(self, at: int | None = None, full: bool = False) -> None:
        self.at = at
        self.full = full
        self.count = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Disk:
        monkeypatch.setattr(files, "os", self)
        monkeypatch.setattr(records, "open", self._open, raising=False)
        return self

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        return self._counted(name, found) if name in self.CHANGES else found

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any) -> Any:
            position, self.count = self.count, self.count + 1
            if position == self.at and name == "write":
                function(given[0], bytes(given[1])[: len(given[1]) // 2])  # torn
            if position == self.at and self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.at is not None and position >= self.at and not self.full:
                raise Killed
            return function(*given)

        return wrapped

    def _open(self, *given: Any, **keywords: Any) -> Any:
        self._counted("append", lambda: None)()
        return open(*given, **keywords)
