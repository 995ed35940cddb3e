"""Gives memory that runs left behind back to the system.

The worker's C library is told to keep what a pass frees, since the next pass needs it (see `serve`); a run that left is
another matter.
"""

from __future__ import annotations

import time

from tinsmith.machine import host_memory

TRIM_INTERVAL_S = 5.0


class FreeMemory:
    def __init__(self) -> None:
        self._trimmed_at = float("-inf")

    def freed(self) -> None:
        """Something large was let go of. Costs some milliseconds, at most every `TRIM_INTERVAL_S`."""
        now = time.monotonic()
        if now - self._trimmed_at > TRIM_INTERVAL_S:
            self._trimmed_at = now
            host_memory.give_back()
