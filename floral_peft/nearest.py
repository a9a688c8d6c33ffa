"""Guessing what a misspelt name was meant to be. Every part of the package may use it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """The end of a sentence about an unknown name: `": did you mean 'rounds'?"` if one is near, else a full stop.

    Args:
        name: What was given; an int, too.
        known: The names that there are; ints, too.
    """
    by_text = {str(one): one for one in known}
    found = get_close_matches(str(name), by_text, n=1)
    return f": did you mean {by_text[found[0]]!r}?" if found else "."
