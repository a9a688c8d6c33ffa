"""One trainer at a time in a folder, by a lock of the operating system, which ends with its process in any case."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


logger = logging.getLogger(__name__)

_NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # by somebody else: flock on POSIX, locking on Windows


class OutputDirInUseError(RuntimeError):
    """Another trainer is training in the same folder."""


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be made.

    Args:
        folder: The folder.
        name: What the user calls it.

    Raises:
        NotADirectoryError: It is a file, or inside one.
    """
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise NotADirectoryError(f"{name}={str(folder)!r}: {str(file)!r} is a file. Choose another {name}.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other trainer, of this process or another, can train in the folder.

    Args:
        folder: The folder. If it is not there it is made, and deleted again if nothing is put into it.

    Raises:
        OutputDirInUseError: Another trainer has it.
        NotADirectoryError: It is a file, or inside one.
    """
    check_folder(folder, "output_dir")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME
    descriptor = _open_locked(folder, path)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open files
            os.unlink(path)
        os.close(descriptor)  # which releases the lock
        if is_new:
            with suppress(OSError):
                os.rmdir(folder)


def _open_locked(folder: Path, path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if _is(path, descriptor):
                return descriptor
        except OSError as error:
            if error.errno not in _HELD:
                logger.warning("%s: this file system has no locks (%s); start no second trainer there.", folder, error)
                return descriptor
            told = os.read(descriptor, 200).decode(errors="replace") if sys.platform != "win32" else ""
            holder = told or "another process"  # which may be about to say which
            os.close(descriptor)
            raise OutputDirInUseError(
                f"output_dir={str(folder)!r} is in use: {holder} is training there. Wait for it to end, or choose "
                "another output_dir."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has just deleted it


def _is(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
