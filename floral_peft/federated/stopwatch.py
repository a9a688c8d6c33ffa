"""Where a round's time goes."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds by phase. The phases add up to the whole, whoever tells that one of them has ended."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap went into this phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
