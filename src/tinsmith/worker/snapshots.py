"""Snapshots of held runs, driven by the debt of replay: what a crash would make us read and compute again.

What stays true:

* A snapshot is copied between steps, after the rows of the ops that it holds were committed, and only when no save of
  that run is still being written: else an op below the snapshot could run again on a later state.
* Payloads are forgotten only after the snapshot that covers them is recorded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import structlog

from tinsmith.blobs import BlobInfo, Blobs, snapshot_key
from tinsmith.checkpoint_file import state_pieces
from tinsmith.config import Settings
from tinsmith.engine import Engine
from tinsmith.errors import FencedError
from tinsmith.store import Store
from tinsmith.store.rows import OpRow, RunRow, WorkerId
from tinsmith.types import BlobKey, Failure, RunId
from tinsmith.worker.writer import Writer

log = structlog.get_logger("tinsmith.worker")


@dataclass(slots=True)
class HeldRun:
    """A leased run. `replays` are finished ops above the snapshot that have not been computed again yet, by seq.

    given_up: why its state can't be had from its log and files.
    """

    row: RunRow
    snapshot: BlobKey | None
    snapshot_seq: int
    applied_seq: int
    replays: dict[int, OpRow]
    debt_bytes: int = 0
    debt_s: float = 0.0
    num_saves: int = 0
    is_snapshotting: bool = False
    given_up: Failure | None = None
    used_at: float = field(default_factory=time.monotonic)


class Snapshots:
    def __init__(
        self, me: WorkerId, store: Store, blobs: Blobs, engine: Engine, settings: Settings, writer: Writer
    ) -> None:
        self._me = me
        self._store = store
        self._blobs = blobs
        self._engine = engine
        self._settings = settings
        self._writer = writer

    def is_due(self, held: HeldRun) -> bool:
        """Its debt is past the settings, and a snapshot can be taken now."""
        over = held.debt_bytes >= self._settings.snapshot_debt_bytes or held.debt_s >= self._settings.snapshot_debt_s
        return over and self.can_start(held)

    def can_start(self, held: HeldRun) -> bool:
        settled = not (held.num_saves or held.is_snapshotting or held.replays)
        return settled and self._engine.has_run(held.row.run_id)

    def start(self, held: HeldRun) -> None:
        """Copy the state now; write and record it beside the loop. A failure is logged, and the log kept."""
        run_id = held.row.run_id
        state = self._engine.export_run(run_id)
        seq, debt_bytes, debt_s = held.applied_seq, held.debt_bytes, held.debt_s
        key = snapshot_key(held.row.tenant_id, run_id, seq)
        held.is_snapshotting = True

        def write() -> BlobInfo:
            return self._blobs.put(key, state_pieces(state))

        def recorded(stored: BlobInfo | BaseException) -> None:
            held.is_snapshotting = False
            if isinstance(stored, BaseException):
                log.error("snapshot failed; the log is kept", run_id=run_id, seq_id=seq, error=str(stored))
                return
            held.debt_bytes -= debt_bytes
            held.debt_s -= debt_s
            self._record(held, run_id, seq, stored)

        self._writer.submit(write, recorded)

    def _record(self, held: HeldRun, run_id: RunId, seq: int, stored: BlobInfo) -> None:
        key, size = stored.key, stored.size
        try:
            previous = self._store.runs.record_snapshot(self._me, run_id, seq, key, size, time.time())
        except FencedError:
            log.warning("snapshot dropped: the run has another holder now", run_id=run_id, seq_id=seq)
            self._blobs.delete(key)
            return
        held.snapshot, held.snapshot_seq = key, seq
        stale = self._store.ops.prune_payloads(run_id, seq)
        for old in [*stale, *([previous] if previous and previous != key else [])]:
            self._blobs.delete(old)
        log.info("run snapshotted", run_id=run_id, seq_id=seq, bytes=size, payloads_dropped=len(stale))
