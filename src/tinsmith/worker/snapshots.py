"""Snapshots of held runs, driven by the debt of replay: what a crash would make us read and compute again.

What stays true:

* A snapshot is copied between steps, and only when no save of that run is still being written; it is recorded after the
  outcomes of all ops that it holds. Else an op below the snapshot could run again on a later state.
* Payloads are forgotten only after a snapshot later than the one that covers them is recorded, and the snapshot before
  the newest is kept: a run whose newest is damaged is computed again from that one.
* Of runs that go on, few copies wait to be written; the others stay in debt meanwhile.

The more runs are in memory, the sooner each is snapshotted, so that they owe together what one alone may: their next
worker pays for all of them. No sooner, though, than the computing was worth `WORTH` times the
processor time of writing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from tinsmith.config import Settings
from tinsmith.crashpoints import crash_point
from tinsmith.engine import Engine
from tinsmith.errors import FencedError
from tinsmith.files.blobs import BlobInfo, Blobs, snapshot_key
from tinsmith.files.checkpoint_file import state_pieces
from tinsmith.observe import series, tracing
from tinsmith.store import Store
from tinsmith.store.rows import RunRow, WorkerId
from tinsmith.store.snapshots import Recorded
from tinsmith.types import BlobKey, RunId, RunState
from tinsmith.worker.held import HeldRun
from tinsmith.worker.recorder import Recorder
from tinsmith.worker.writer import Writer

log = structlog.get_logger("tinsmith.worker")


MAX_COPIES = 4  # states that wait to be written, when passes go on beside
WORTH = 50.0
LEFT_BY_OTHERS = re.compile(r"(\d+)-[0-9a-f]+\.[0-9a-f]+")  # see `snapshot_key`; the first number is the seq


@dataclass(frozen=True, slots=True)
class Written:
    """A snapshot whose file and row are on disk, and the processor time that both took."""

    blob: BlobInfo
    cpu_s: float


def most_debt_s(settings_s: float, num_resident: int, write_s: float) -> float:
    """Seconds of computing that a run may owe: its part of `settings_s`, which all runs in memory share, or all of that
    where a snapshot, which takes `write_s` of processor time, would come too often. Pure."""
    return min(settings_s, max(settings_s / max(1, num_resident), WORTH * write_s))


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
        self._num_copies = 0
        self._write_s = 0.0  # processor time of the last one

    def is_over(self, held: HeldRun, num_resident: int) -> bool:
        """Its debt is past the settings, or its newest snapshot is damaged and a new one can take its place.

        num_resident: runs in memory, which share the seconds that all may owe.
        """
        is_bare = held.is_fallen_back and held.debt_ops > 0
        return (
            is_bare
            or held.debt_bytes >= self._settings.snapshot_debt_bytes
            or held.debt_s >= most_debt_s(self._settings.snapshot_debt_s, num_resident, held.write_s or self._write_s)
        )

    def can_start(self, held: HeldRun) -> bool:
        settled = not (held.num_saves or held.is_snapshotting or held.replays)
        return settled and self._engine.has_run(held.row.run_id)

    def may_copy(self, held: HeldRun) -> bool:
        """As `can_start`, for a run that isn't on its way out: copies are few, and one that failed is tried later."""
        return self._num_copies < MAX_COPIES and time.monotonic() >= held.not_before and self.can_start(held)

    def start(self, held: HeldRun, *, is_still: bool = False) -> None:
        """Copy the state now; write and record it beside the loop. A failure is logged, and the log kept.

        is_still: the run won't be touched until `is_snapshotting` ends, so nothing has to be copied.
        """
        run_id = held.row.run_id
        state = self._engine.export_run(run_id, copy=not is_still)
        seq, debt_ops, debt_bytes, debt_s = held.applied_seq, held.debt_ops, held.debt_bytes, held.debt_s
        is_newest_damaged = held.is_fallen_back
        key = snapshot_key(held.row.tenant_id, run_id, seq)
        held.is_snapshotting = True
        self._num_copies += not is_still
        mark = self._recorder.mark()

        def recorded(written: Written | BaseException | None) -> None:
            held.is_snapshotting = False
            self._num_copies -= not is_still
            if isinstance(written, Written):
                held.write_s = self._write_s = written.cpu_s
                held.debt_ops -= debt_ops
                held.debt_bytes -= debt_bytes
                held.debt_s -= debt_s
                held.snapshot, held.snapshot_seq = written.blob.key, seq
                held.is_fallen_back, held.retry_s = False, 0.0
                self._on_disk(written.blob.key, state)
            elif written is None:
                held.snapshot_failed()
            else:
                pause = held.snapshot_failed()
                error = f"{type(written).__name__}: {written}"
                series.SNAPSHOT_FAILURES.add()
                log.error(
                    "snapshot failed; the log is kept", **_about(held.row), seq_id=seq, again_in_s=pause, error=error
                )

        self._writer.submit(lambda: self._write(held.row, seq, key, state, mark, is_newest_damaged), recorded)

    def _write(
        self, row: RunRow, seq: int, key: BlobKey, state: RunState, mark: int, is_newest_damaged: bool
    ) -> Written | None:
        """The file and its record, in the writer's thread. None: the run has another holder now."""
        run_id = row.run_id
        started, cpu_started = time.perf_counter(), time.thread_time()
        crash_point("snapshot.before_file")
        stored = self._blobs.put(key, state_pieces(state))
        crash_point("snapshot.after_file")
        self._recorder.wait(mark)
        try:
            recorded = self._store.runs.record_snapshot(
                self._me, run_id, seq, stored.key, stored.size, time.time(), is_newest_damaged=is_newest_damaged
            )
        except FencedError:
            log.warning("snapshot dropped: the run has another holder now", **_about(row), seq_id=seq)
            self._blobs.delete(stored.key)
            return None
        crash_point("snapshot.after_row")
        num_dropped = self._delete_old(run_id, seq, stored.key, recorded)
        seconds = time.perf_counter() - started
        series.SNAPSHOT_SECONDS.observe(seconds)
        series.SNAPSHOT_BYTES.add(by=stored.size)
        tracing.snapshot(run_id, row.tenant_id, time.time() - seconds, time.time(), stored.size)
        log.info("run snapshotted", **_about(row), seq_id=seq, bytes=stored.size, payloads_dropped=num_dropped)
        return Written(stored, time.thread_time() - cpu_started)

    def _delete_old(self, run_id: RunId, seq: int, key: BlobKey, recorded: Recorded) -> int:
        """What the recorded snapshot takes out of use, and what dead writers of this run left; how many payloads.

        A later holder of the run begins with the recorded snapshot, so it writes none of a lower seq.
        """
        for left in self._blobs.beside(key):
            match = LEFT_BY_OTHERS.fullmatch(left.rpartition("/")[2])
            if match and int(match[1]) < seq and left != recorded.previous:
                self._blobs.delete(left)
        if recorded.gone is not None and recorded.gone != key:
            self._blobs.delete(recorded.gone)
        stale = self._store.runs.prune_payloads(run_id) if recorded.has_stale else []
        crash_point("snapshot.after_prune")
        for number, payload in enumerate(stale):
            self._blobs.delete(payload)
            if number == 0:
                crash_point("snapshot.half_deleted")
        return len(stale)


def _about(row: RunRow) -> dict[str, str]:
    return {"run_id": row.run_id, "tenant_id": row.tenant_id}
