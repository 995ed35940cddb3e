"""Sees that the loop goes on: a piece of work that takes far longer than it should ends the process.

The loop says what it begins; a thread beside it looks, and beats for the supervisor meanwhile. What hung is in the rows
as running, so the next worker runs each of those ops alone, and the one that hangs again is found. A hang that keeps
the thread itself from running shows as a missing beat.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import structlog

from tinsmith.ipc.pulse import BEAT_S, Pulse
from tinsmith.observe.about import about
from tinsmith.store.rows import OpRow

log = structlog.get_logger("tinsmith.worker")

EXIT_HUNG = 76
LEAST_S = 300.0  # of a piece whose length is known: files and kernels that are compiled take their time too
TIMES = 30.0  # how much longer than measured a piece may take
OVERDUE = "no progress: what the worker is at takes far too long; it ends, and the next one goes on"
UNKNOWN_S = 1800.0  # of one whose speed isn't known: the first pass on a slow machine


class Watchdog:
    """Written by the loop's thread, read by `watch`'s."""

    def __init__(self, timeout_s: float = 0.0) -> None:
        """timeout_s: of any piece; 0: thirty times what was measured, and five minutes at least."""
        self._timeout_s = timeout_s
        self._until: float | None = None
        self._ops: Collection[OpRow] = ()

    def begin(self, expected_s: float | None = 0.0) -> None:
        """The loop goes on, with a piece that should take so long; None: nobody knows."""
        limit_s = self._timeout_s or (UNKNOWN_S if expected_s is None else max(LEAST_S, TIMES * expected_s))
        self._until = time.monotonic() + limit_s

    @contextmanager
    def at(self, ops: Collection[OpRow], expected_s: float | None = 0.0) -> Iterator[None]:
        """Around a piece of work for these; see `begin`."""
        self.begin(expected_s)
        self._ops = ops
        try:
            yield
        finally:
            self._ops = ()

    @property
    def ops(self) -> list[OpRow]:
        """What the loop is at, as far as it is for requests."""
        return list(self._ops)

    def rest(self) -> None:
        """The loop waits for work."""
        self._until = None

    @property
    def is_overdue(self) -> bool:
        until = self._until
        return until is not None and time.monotonic() > until


def watch(watchdog: Watchdog, pulse: Pulse, stop: threading.Event, sign: Callable[[], bytes]) -> threading.Thread:
    """Beat from a thread of its own, with what `sign` says then, and end the process, without clean-up, once the loop
    is overdue."""
    thread = threading.Thread(target=_watch, args=(watchdog, pulse, stop, sign), name="pulse", daemon=True)
    thread.start()
    return thread


def _watch(watchdog: Watchdog, pulse: Pulse, stop: threading.Event, sign: Callable[[], bytes]) -> None:
    pulse.beat(sign())
    while not stop.wait(BEAT_S):
        pulse.beat(sign())
        if watchdog.is_overdue:
            try:
                log.error(OVERDUE, **about(watchdog.ops))
            finally:
                os._exit(EXIT_HUNG)
