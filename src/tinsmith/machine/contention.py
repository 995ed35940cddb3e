"""How long a thread stood ready while others had the cores: whether what it does takes time from them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

TASKS = Path("/proc/self/task")


class Contention:
    """Of the thread that makes it. Where the kernel doesn't count this (CONFIG_SCHED_INFO), it is always 0."""

    def __init__(self, tasks: Path = TASKS) -> None:
        self._stat = tasks / str(threading.get_native_id()) / "schedstat"
        self._waited_s, self._at = self._now()

    def share(self) -> float:
        """Of the time since the last call, what it stood ready and waited; 0.0 to 1.0."""
        waited_s, at = self._now()
        share = (waited_s - self._waited_s) / max(1e-6, at - self._at)
        self._waited_s, self._at = waited_s, at
        return min(1.0, max(0.0, share))

    def _now(self) -> tuple[float, float]:
        try:
            waited_s = int(self._stat.read_bytes().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            waited_s = 0.0
        return waited_s, time.monotonic()
