"""Notices when the wall clock was set, by comparing it with one that only ever runs on.

Rows hold wall times, since processes share them. Whoever concludes from one that somebody has been silent for long asks
here first: a clock that is put forward by hours makes everybody look silent, and one that is put back makes the dead
look alive. A machine that was asleep looks like a clock that was put forward, and is treated alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable

STEP_S = 2.0  # less is not told apart from a busy machine


class Clock:
    """For one thread; it sees what happened between two of its calls."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._steady = steady
        self._offset = wall() - steady()
        self._stepped_at = float("-inf")

    def step(self) -> float:
        """By how many seconds the clock was set since the last call; negative: back; 0.0 if it ran evenly."""
        offset = self._wall() - self._steady()
        by, self._offset = offset - self._offset, offset
        if abs(by) < STEP_S:
            return 0.0
        self._stepped_at = self._steady()
        return by

    def is_even(self, for_s: float) -> bool:
        """Whether it wasn't set for so long, as far as was looked."""
        self.step()
        return self._steady() - self._stepped_at >= for_s
