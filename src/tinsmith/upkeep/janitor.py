"""Takes out what is no longer needed: silent sessions, old results, expired checkpoints, files without a row, the logs
of runs that rest (cooling.py), what is old where the operator wants it to go (letting_go.py).

Every call is harmless at any time and in any number of processes: the rows decide, each in its own transaction, and a
file is deleted only once nothing refers to it.

A crash between a file and its row leaves a file that nothing names (`Leftovers`). One that was written a moment ago
looks the same, and its age is a matter of clocks: so a file goes only if it is old by the wall clock and was seen
without a row twice, with a good while between by the monotonic one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from tinsmith.config import Settings
from tinsmith.crashpoints import crash_point
from tinsmith.errors import UserError
from tinsmith.files.blobs import Blobs
from tinsmith.machine.clock import Clock
from tinsmith.store import Store
from tinsmith.store.sessions import EMPTY_S
from tinsmith.types import BlobKey
from tinsmith.upkeep.backup import drop_abandoned
from tinsmith.upkeep.cooling import Cooling
from tinsmith.upkeep.letting_go import sweep_old

log = structlog.get_logger("tinsmith.janitor")

SWEEP_EVERY_S = 30.0
PAGE = 1000
LEFTOVER_AFTER_S = 3600.0  # a file that is still being written, or whose row is about to be, is younger
LOOK_EVERY_S = 300.0  # between two looks for files without a row
SEEK_EVERY_S = 600.0  # between two looks at all runs
SEEN_FOR_S = 240.0  # a file had no row for so long when it goes


@dataclass(frozen=True, slots=True)
class Swept:
    num_sessions: int
    num_results: int
    num_files: int


class Leftovers:
    """Files that no row names, as they were seen; for one thread."""

    def __init__(self) -> None:
        self._seen: dict[BlobKey, float] = {}
        self._looked_at = float("-inf")

    def sweep(self, store: Store, blobs: Blobs, now: float, monotonic: float) -> int:
        """Delete those that are old and were seen long enough; how many. now: unix seconds.

        Files that are being written have a name of their own (`Blobs.sweep`). Looks at all files, so it does it only
        every `LOOK_EVERY_S`.
        """
        if monotonic - self._looked_at < LOOK_EVERY_S:
            return 0
        self._looked_at = monotonic
        old = [file for file in blobs.files() if not file.is_unfinished and file.changed_at < now - LEFTOVER_AFTER_S]
        orphans = store.files.orphans(file.key for file in old)
        self._seen = {key: self._seen.get(key, monotonic) for key in orphans}
        due = [file for file in old if monotonic - self._seen.get(file.key, monotonic) >= SEEN_FOR_S]
        for file in due:
            blobs.discard(file)
            del self._seen[file.key]
        if due:
            log.info("files without a row removed", files=len(due), num_bytes=sum(file.size for file in due))
        return len(due)


def sweep(
    store: Store, blobs: Blobs, settings: Settings, now: float, *, can_tell_age: bool = True, seeks_idle: bool = True
) -> Swept:
    """One round. `now`: unix seconds. can_tell_age: the clock wasn't set lately, so times tell an age. seeks_idle: look
    at all runs for those that nobody touches."""
    sessions = store.sessions.expire(now - settings.session_timeout_s, now)
    num_results = 0
    while (expired := store.ops.expire_results(now - settings.result_ttl_s, now, PAGE)) > 0:
        num_results += expired
    while store.samplers.retire(now - settings.result_ttl_s, now, PAGE) == PAGE:
        pass
    while store.losses.retire(now - settings.result_ttl_s, now, PAGE) == PAGE:
        pass
    while store.sessions.drop_empty(now - EMPTY_S, PAGE) == PAGE:
        pass
    store.quotas.forget(now)
    if can_tell_age:
        sweep_old(store, settings, now, seeks_idle=seeks_idle)
    num_files = 0
    if can_tell_age:
        num_files += blobs.sweep(now - LEFTOVER_AFTER_S)
        drop_abandoned(settings.data_dir, now - LEFTOVER_AFTER_S)
    while dead := store.checkpoints.collect(now):
        crash_point("janitor.before_delete")
        for key in dead:
            try:
                blobs.delete(key)
            except UserError as error:  # the name of no file
                log.error("a row that was changed on the disk named a file to delete", error=error.message)
            crash_point("janitor.half_deleted")
        num_files += len(dead)
    return Swept(len(sessions), num_results, num_files)


def note_step(store: Store, settings: Settings, by_s: float, now: float) -> None:
    """The wall clock was set by so many seconds, if any: nobody is to look silent, or alive, for that alone."""
    if by_s:
        log.warning("the clock was set; silence is reckoned by the new time", by_s=round(by_s, 3))
        store.silence.clock_was_set(by_s, now, settings.lease_s)


@contextlib.contextmanager
def sweeping(
    store: Store, blobs: Blobs, settings: Settings, beside: Callable[[float], object] = lambda _: None
) -> Iterator[None]:
    """Sweep every now and then in a thread of its own, for as long as the block runs; `beside` is called with the time
    (unix seconds) at each round, and once at the start."""
    stop = threading.Event()
    leftovers = Leftovers()
    cooling = Cooling()
    clock = Clock()

    def work() -> None:
        pause_s, sought_at = 0.0, float("-inf")
        while not stop.wait(pause_s):
            try:
                beside(time.time())
                note_step(store, settings, clock.step(), time.time())
                can_tell_age = clock.is_even(LEFTOVER_AFTER_S)
                if pause_s:
                    seeks_idle = time.monotonic() - sought_at > SEEK_EVERY_S
                    now = time.time()
                    swept = sweep(store, blobs, settings, now, can_tell_age=can_tell_age, seeks_idle=seeks_idle)
                    sought_at = time.monotonic() if seeks_idle else sought_at
                    cooling.sweep(store, blobs, time.time() - settings.result_ttl_s, time.time())
                else:
                    swept = Swept(0, 0, 0)
                if can_tell_age:
                    leftovers.sweep(store, blobs, time.time(), time.monotonic())
            except Exception:
                log.exception("sweeping failed; trying again later")
                continue
            finally:
                pause_s = SWEEP_EVERY_S
            if any((swept.num_sessions, swept.num_results, swept.num_files)):
                log.info("swept", sessions=swept.num_sessions, results=swept.num_results, files=swept.num_files)

    thread = threading.Thread(target=work, name="janitor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
