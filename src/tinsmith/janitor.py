"""Takes out what is no longer needed: silent sessions, old results, expired checkpoints, files without a row.

Every call is harmless at any time and in any number of processes: the rows decide, each in its own transaction, and a
file is deleted only once nothing refers to it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from tinsmith.blobs import Blobs
from tinsmith.clock import Clock
from tinsmith.config import Settings
from tinsmith.crashpoints import crash_point
from tinsmith.store import Store

log = structlog.get_logger("tinsmith.janitor")

SWEEP_EVERY_S = 30.0
PAGE = 1000
LEFTOVER_AFTER_S = 3600.0  # a file that is still being written is younger


@dataclass(frozen=True, slots=True)
class Swept:
    num_sessions: int
    num_results: int
    num_files: int


def sweep(store: Store, blobs: Blobs, settings: Settings, now: float, *, can_tell_age: bool = True) -> Swept:
    """One round. `now`: unix seconds. can_tell_age: the clock wasn't set lately, so files' times tell their age."""
    sessions = store.sessions.expire(now - settings.session_timeout_s, now)
    num_results = 0
    while (expired := store.ops.expire_results(now - settings.result_ttl_s, now, PAGE)) > 0:
        num_results += expired
    while store.samplers.retire(now - settings.result_ttl_s, now, PAGE) == PAGE:
        pass
    while store.losses.retire(now - settings.result_ttl_s, now, PAGE) == PAGE:
        pass
    num_files = blobs.sweep(now - LEFTOVER_AFTER_S) if can_tell_age else 0
    while dead := store.checkpoints.collect(now):
        crash_point("janitor.before_delete")
        for key in dead:
            blobs.delete(key)
            crash_point("janitor.half_deleted")
        num_files += len(dead)
    return Swept(len(sessions), num_results, num_files)


def note_step(store: Store, settings: Settings, by_s: float, now: float) -> None:
    """The wall clock was set by so many seconds, if any: nobody is to look silent, or alive, for that alone."""
    if by_s:
        log.warning("the clock was set; silence is reckoned by the new time", by_s=round(by_s, 3))
        store.silence.clock_was_set(by_s, now, settings.lease_s)


@contextlib.contextmanager
def sweeping(store: Store, blobs: Blobs, settings: Settings) -> Iterator[None]:
    """Sweep every now and then in a thread of its own, for as long as the block runs."""
    stop = threading.Event()
    clock = Clock()

    def work() -> None:
        while not stop.wait(SWEEP_EVERY_S):
            try:
                note_step(store, settings, clock.step(), time.time())
                swept = sweep(store, blobs, settings, time.time(), can_tell_age=clock.is_even(LEFTOVER_AFTER_S))
            except Exception:
                log.exception("sweeping failed; trying again later")
                continue
            if any((swept.num_sessions, swept.num_results, swept.num_files)):
                log.info("swept", sessions=swept.num_sessions, results=swept.num_results, files=swept.num_files)

    thread = threading.Thread(target=work, name="janitor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
