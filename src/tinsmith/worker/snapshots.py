"""Snapshots of held runs, driven by the debt of replay: what a crash would make us read and compute again.

What stays true:

* A snapshot is copied between steps, and only when no save of that run is still being written; it is recorded after the
  outcomes of all ops that it holds. Else an op below the snapshot could run again on a later state.
* Payloads are forgotten only after the snapshot that covers them is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from tinsmith import series, tracing
from tinsmith.blobs import BlobInfo, Blobs, snapshot_key
from tinsmith.checkpoint_file import state_pieces
from tinsmith.config import Settings
from tinsmith.engine import Engine
from tinsmith.errors import FencedError
from tinsmith.store import Store
from tinsmith.store.rows import OpRow, RunRow, WorkerId
from tinsmith.types import BlobKey, Failure, RunState
from tinsmith.worker.recorder import Recorder
from tinsmith.worker.writer import Writer

log = structlog.get_logger("tinsmith.worker")


@dataclass(slots=True)
class HeldRun:
    """A leased run. `replays` are finished ops above the snapshot that have not been computed again yet, by seq.

    debt: of the ops that changed the state in memory since the snapshot.
    given_up: why its state can't be had from its log and files.
    """

    row: RunRow
    snapshot: BlobKey | None
    snapshot_seq: int
    applied_seq: int
    replays: dict[int, OpRow]
    debt_ops: int = 0
    debt_bytes: int = 0
    debt_s: float = 0.0
    num_saves: int = 0
    is_snapshotting: bool = False
    given_up: Failure | None = None
    used_at: float = field(default_factory=time.monotonic)


class Snapshots:
    def __init__(
        self,
        me: WorkerId,
        store: Store,
        blobs: Blobs,
        engine: Engine,
        settings: Settings,
        writer: Writer,
        recorder: Recorder,
        on_disk: Callable[[BlobKey, RunState], None],
    ) -> None:
        """`on_disk` is told of each state whose file is recorded."""
        self._me = me
        self._store = store
        self._blobs = blobs
        self._engine = engine
        self._settings = settings
        self._writer = writer
        self._recorder = recorder
        self._on_disk = on_disk

    def is_over(self, held: HeldRun) -> bool:
        """Its debt is past the settings."""
        return held.debt_bytes >= self._settings.snapshot_debt_bytes or held.debt_s >= self._settings.snapshot_debt_s

    def can_start(self, held: HeldRun) -> bool:
        settled = not (held.num_saves or held.is_snapshotting or held.replays)
        return settled and self._engine.has_run(held.row.run_id)

    def start(self, held: HeldRun, *, is_still: bool = False) -> None:
        """Copy the state now; write and record it beside the loop. A failure is logged, and the log kept.

        is_still: the run won't be touched until `is_snapshotting` ends, so nothing has to be copied.
        """
        run_id = held.row.run_id
        state = self._engine.export_run(run_id, copy=not is_still)
        seq, debt_ops, debt_bytes, debt_s = held.applied_seq, held.debt_ops, held.debt_bytes, held.debt_s
        key = snapshot_key(held.row.tenant_id, run_id, seq)
        held.is_snapshotting = True
        mark = self._recorder.mark()

        def recorded(stored: BlobInfo | BaseException | None) -> None:
            held.is_snapshotting = False
            if isinstance(stored, BaseException):
                series.SNAPSHOT_FAILURES.add()
                log.error("snapshot failed; the log is kept", **_about(held.row), seq_id=seq, error=str(stored))
            elif stored is not None:
                held.debt_ops -= debt_ops
                held.debt_bytes -= debt_bytes
                held.debt_s -= debt_s
                held.snapshot, held.snapshot_seq = stored.key, seq
                self._on_disk(stored.key, state)

        self._writer.submit(lambda: self._write(held.row, seq, key, state, mark), recorded)

    def _write(self, row: RunRow, seq: int, key: BlobKey, state: RunState, mark: int) -> BlobInfo | None:
        """The file and its record, in the writer's thread. None: the run has another holder now."""
        run_id = row.run_id
        started = time.perf_counter()
        stored = self._blobs.put(key, state_pieces(state))
        self._recorder.wait(mark)
        try:
            previous = self._store.runs.record_snapshot(self._me, run_id, seq, stored.key, stored.size, time.time())
        except FencedError:
            log.warning("snapshot dropped: the run has another holder now", **_about(row), seq_id=seq)
            self._blobs.delete(stored.key)
            return None
        stale = self._store.ops.prune_payloads(run_id, seq)
        for old in [*stale, *([previous] if previous and previous != stored.key else [])]:
            self._blobs.delete(old)
        seconds = time.perf_counter() - started
        series.SNAPSHOT_SECONDS.observe(seconds)
        series.SNAPSHOT_BYTES.add(by=stored.size)
        tracing.snapshot(run_id, row.tenant_id, time.time() - seconds, time.time(), stored.size)
        log.info("run snapshotted", **_about(row), seq_id=seq, bytes=stored.size, payloads_dropped=len(stale))
        return stored


def _about(row: RunRow) -> dict[str, str]:
    return {"run_id": row.run_id, "tenant_id": row.tenant_id}
