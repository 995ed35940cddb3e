"""Which blocking calls may run on the event loop itself: short ones, as long as they prove to be short."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
BRIEF_S = 0.002  # what a call may hold up the event loop, judged by the one before it


class Brief:
    """Whether calls of one kind are short enough to be carried out on the event loop: as short as the last one was.

    May be used from any thread, by one at a time.
    """

    def __init__(self) -> None:
        self._last_s = 0.0

    @property
    def is_now(self) -> bool:
        return self._last_s < BRIEF_S

    def timed(self, call: Callable[[], T]) -> T:
        """Carry out a call and remember how long it took."""
        started = time.perf_counter()
        try:
            return call()
        finally:
            self._last_s = time.perf_counter() - started
