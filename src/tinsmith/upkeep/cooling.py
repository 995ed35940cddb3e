"""Runs that nobody has asked for anything for long, and whose session has ended: what of them has to be kept.

A run's log is kept as far back as its snapshot before the newest, and longer than that one's results. Of a run that
rests, a copy of the newest snapshot takes the place of the one before, and the log goes: it is as safe from a damaged
file as it was, goes on from where it is, and takes two files and a row. A snapshot that is found damaged here leaves
all as it is; whoever asks for the run next goes on from the one before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import BinaryIO

import structlog

from tinsmith.crashpoints import crash_point
from tinsmith.errors import CorruptError, UserError
from tinsmith.files.blobs import CHECKED_BYTES, Blobs, snapshot_key
from tinsmith.store import Store
from tinsmith.store.snapshots import Cold
from tinsmith.types import RunId

log = structlog.get_logger("tinsmith.janitor")

AT_ONCE = 100  # runs of one round
ROUND_S = 5.0  # which ends sooner if it takes so long


class Cooling:
    """Goes over the runs again and again, some at each round; for one thread."""

    def __init__(self) -> None:
        self._above = RunId("")

    def sweep(self, store: Store, blobs: Blobs, before: float, now: float) -> int:
        """One round over runs that were asked for nothing since `before` (unix seconds); how many were brought to rest.

        Raises:
            OSError: the disk is full, or can't be written.
        """
        until = time.monotonic() + ROUND_S
        found = store.runs.cold(before, self._above, AT_ONCE)
        num_rested = 0
        for cold in found:
            num_rested += _rest(store, blobs, cold, now)
            self._above = cold.run_id
            if time.monotonic() > until:
                return num_rested
        if len(found) < AT_ONCE:
            self._above = RunId("")
        return num_rested


def _rest(store: Store, blobs: Blobs, cold: Cold, now: float) -> bool:
    if cold.newest.blob is None:
        return False
    try:
        with blobs.open_checked(cold.newest.blob) as file:
            spare = blobs.put(snapshot_key(cold.tenant_id, cold.run_id, cold.newest.seq), _pieces(file)).key
    except (CorruptError, UserError) as error:  # gone, or its name is none
        ids = {"run_id": cold.run_id, "tenant_id": cold.tenant_id, "snapshot": cold.newest.blob}
        log.error(
            "a resting run's newest snapshot is damaged; its log and the one before stay", **ids, error=str(error)
        )
        return False
    crash_point("janitor.after_spare")
    if not store.runs.put_spare(cold, spare, now):
        blobs.delete(spare)
        return False
    for payload in store.runs.prune_payloads(cold.run_id):
        blobs.delete(payload)
    return True


def _pieces(file: BinaryIO) -> Iterator[memoryview]:
    while piece := file.read(CHECKED_BYTES):
        yield memoryview(piece)
