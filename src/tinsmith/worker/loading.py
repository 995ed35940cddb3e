"""How far a worker's base is read: for the log, for `/metrics`, and for the parent over the pulse.

Told by the threads that read weights, asked by the one that beats.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from tinsmith.ipc.pulse import SERVING, reading
from tinsmith.observe import series

log = structlog.get_logger("tinsmith.worker")

SAY_APART_S, SAY_WITHIN_S = 5.0, 60.0  # between lines of the log, where a further tenth was read and where none was
COUNT_EVERY_S = 0.5


class Loading:
    def __init__(self, base: str, slot: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._base = base
        self._slot = slot
        self._clock = clock
        self._began = self._said = clock()
        self._share = 0.0
        self._tenths_said = 0
        self.is_done = False

    def tell(self, done: int, total: int) -> None:
        """Bytes of the weights' files that were read, and all of them."""
        self._share = done / total if total else 1.0
        series.BASE_READ.set(self._share, self._slot)
        series.BASE_READ.publish(COUNT_EVERY_S)
        now = self._clock()
        tenths = 10 * done // max(1, total)
        if now - self._said >= (SAY_APART_S if tenths > self._tenths_said else SAY_WITHIN_S):
            self._said, self._tenths_said = now, tenths
            seconds = round(now - self._began, 1)
            log.info(f"reading the base's weights: {self._share:.0%}", base=self._base, bytes=done, seconds=seconds)

    def sign(self) -> bytes:
        """What the pulse says now."""
        return SERVING if self.is_done else reading(self._share)
