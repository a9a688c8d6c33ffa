"""Writing what must survive a crash, and reading it back with a check. Whatever a run changes on disk goes by here."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


_PIECE = 2**20
_TEMPORARY = ".tmp"


class Draft:
    """A file that is written under a temporary name and gets its own at once, when it is complete.

    Args:
        path: A name in the folder where the file will be; the temporary name is made from it.
    """

    def __init__(self, path: Path) -> None:
        # The same for every process, so that kills leave one at most, which the next writer takes.
        self._path = path.with_name(f".{path.name}{_TEMPORARY}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._descriptor: int | None = os.open(self._path, flags, 0o666)
        self.size = 0

    def write(self, content: bytes) -> None:
        """Append bytes."""
        left = memoryview(content)
        while left and self._descriptor is not None:
            written = os.write(self._descriptor, left)
            self.size += written
            left = left[written:]

    def publish(self, path: Path, durable: bool = True) -> None:
        """Give the file its name. What had that name before is there until then, and gone afterwards.

        Args:
            path: The name.
            durable: Also survive a loss of power: wait until the bytes are on the disk. A crash of the process is
                survived in any case.
        """
        if durable and self._descriptor is not None:
            os.fsync(self._descriptor)
        self._close()
        os.replace(self._path, path)
        if durable:
            sync(path.parent)

    def discard(self) -> None:
        """Delete the file, if it has no name yet."""
        self._close()
        remove(self._path)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_file(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file so that its name holds all of the content or what it held before.

    Args:
        path: The file; its folder must exist.
        content: The bytes.
        durable: As in [`Draft.publish`].
    """
    draft = Draft(path)
    try:
        draft.write(content)
        draft.publish(path, durable)
    except BaseException:
        draft.discard()
        raise


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and needs not
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, or a folder and all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)


def is_temporary(path: Path) -> bool:
    """Whether a file is a [`Draft`] that a crash may have left."""
    return path.name.startswith(".") and path.suffix == _TEMPORARY


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal; a piece of it is in memory at a time."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
