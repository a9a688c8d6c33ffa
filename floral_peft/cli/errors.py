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


class Interrupted(KeyboardInterrupt):
    """The user has interrupted a command; the text says how to go on with it."""


@contextmanager
def bad_input() -> Iterator[None]:
    """While what the user gave is being checked and built: its refusals become [`UsageError`]s."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, CheckpointError, ProcessError, StoreError, TooFewClientsError) as error:
        raise UsageError(" ".join(str(error).split())) from error


class _EachFlagOnce(argparse.HelpFormatter):
    """Tells a flag under one name (it may be written with dashes, too), and its default where there is one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar or "VALUE"
        if action.nargs == "?":
            value = f"[{value}]"
        return f"{action.option_strings[0]} {value}{' ...' if action.nargs in ('*', '+') else ''}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help is None or action.default in (None, [], {}, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (%(default)s)"


class StrictParser(argparse.ArgumentParser):
    """Raises instead of leaving, takes no abbreviations, and names the flag nearest to an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _EachFlagOnce, **kwargs, "allow_abbrev": False})

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
