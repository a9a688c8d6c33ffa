"""How the command line says no: one paragraph and status 2, never a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from floral_peft.federated import CheckpointError, ProcessError, StoreError, TooFewClientsError
from floral_peft.nearest import did_you_mean


class UsageError(ValueError):
    """The command line, or a file it names, asks for something that cannot be."""


@contextmanager
def bad_input() -> Iterator[None]:
    """While what the user gave is being checked and built: its refusals become [`UsageError`]s."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, CheckpointError, ProcessError, StoreError, TooFewClientsError) as error:
        raise UsageError(" ".join(str(error).split())) from error


class StrictParser(argparse.ArgumentParser):
    """Raises instead of leaving, takes no abbreviations, and names the flag nearest to an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise [`UsageError`]."""
        raise UsageError(message)

    @property
    def keys(self) -> list[str]:
        """The names of all settings."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def refuse(self, words: list[str]) -> None:
        """Raise [`UsageError`] for words that no setting took."""
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("-"):
                raise UsageError(
                    f"there is no setting {flag}{did_you_mean(flag.lstrip('-').replace('-', '_'), self.keys)}"
                )
        if words:
            raise UsageError(f"{words[0]!r} belongs to no setting: settings are given as --name value.")
