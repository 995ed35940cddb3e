"""Runs whose log can't be computed again for lack of memory: when each is tried next, and who has waited too long.

A lack of memory says nothing about a run: its log and its files are whole. So the run waits, its requests with it, and
is tried again after pauses that grow. Those who wait are told in the end; the run is never given up for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from tinsmith.errors import NoMemoryError
from tinsmith.observe.about import about
from tinsmith.store.rows import OpRow
from tinsmith.types import Failure, RunId

log = structlog.get_logger("tinsmith.worker")

FIRST_RETRY_S = 1.0
MAX_RETRY_S = 30.0
PATIENCE_S = 60.0  # from then on requests of the run are answered at each try
LACKS = (NoMemoryError.code, "out_of_memory")  # the second is what a pass says of a sequence that fits in no pack
TOO_LONG = NoMemoryError(
    "there is no memory at the moment to bring the run back to where it was; nothing of it is lost, and this request "
    "had no effect: send it again later, or have the server given more memory"
).as_failure()


@dataclass(slots=True)
class _Wait:
    since: float
    pause_s: float
    until: float


class Postponed:
    def __init__(self) -> None:
        self._waits: dict[RunId, _Wait] = {}

    def add(self, run_id: RunId, op: OpRow, failure: Failure) -> None:
        """The run found no memory just now, for this request of its log."""
        now = time.monotonic()
        before = self._waits.get(run_id)
        if before is None:
            self._waits[run_id] = _Wait(now, FIRST_RETRY_S, now + FIRST_RETRY_S)
        elif before.until <= now:
            pause_s = min(2 * before.pause_s, MAX_RETRY_S)
            self._waits[run_id] = _Wait(before.since, pause_s, now + pause_s)
        log.warning("no memory to compute a run's log again: it waits", **about([op]), error=failure.message)

    def is_waiting(self, run_id: RunId) -> bool:
        """Whether it isn't to be tried yet."""
        wait = self._waits.get(run_id)
        return wait is not None and time.monotonic() < wait.until

    def is_long(self, run_id: RunId) -> bool:
        """Whether those who wait for the run are to be told."""
        wait = self._waits.get(run_id)
        return wait is not None and time.monotonic() - wait.since >= PATIENCE_S

    def forget(self, run_id: RunId) -> None:
        """It is back, or isn't this worker's any more: what comes later is another wait."""
        self._waits.pop(run_id, None)
