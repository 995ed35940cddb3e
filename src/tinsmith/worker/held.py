"""A leased run as its worker knows it: what is on disk of it, what is in memory, and what a crash would cost.

Pure bookkeeping. What stays true: `snapshot` and `replays` together give the state that the log describes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tinsmith.recovery import Logged, plan_recovery
from tinsmith.store.rows import OpRow, RunRow
from tinsmith.types import BlobKey, Failure, RunId

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0

ReadLog = Callable[[RunId, int], list[OpRow]]  # the ops above a seq_id that are replayed


@dataclass(slots=True)
class HeldRun:
    """`replays` are finished ops above the snapshot that have not been computed again yet, by seq.

    debt: of the ops that changed the state in memory since the snapshot.
    is_fallen_back: its newest snapshot is damaged; `snapshot` is the one before, or None if the log is whole.
    given_up: why its state can't be had from its log and files.
    write_s: processor time of writing its last snapshot, 0 before the first.
    retry_s, not_before: pause after a snapshot that failed, and its end on the monotonic clock.
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
    is_fallen_back: bool = False
    given_up: Failure | None = None
    write_s: float = 0.0
    retry_s: float = 0.0
    not_before: float = float("-inf")
    used_at: float = field(default_factory=time.monotonic)
    held_since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, row: RunRow, read_log: ReadLog) -> HeldRun:
        """As its row and its log describe it.

        Raises:
            CorruptError: they don't give its state.
        """
        return cls._from(row, row.snapshot_seq, row.snapshot_blob, read_log)

    @classmethod
    def fallen_back(cls, row: RunRow, read_log: ReadLog) -> HeldRun:
        """The same without its newest snapshot, where `row.has_previous`. Raises: as `of`."""
        held = cls._from(row, row.previous_seq, row.previous_blob, read_log)
        held.is_fallen_back = True
        return held

    @classmethod
    def lost(cls, row: RunRow) -> HeldRun:
        """One whose state can't be had."""
        return cls(row=row, snapshot=None, snapshot_seq=row.snapshot_seq, applied_seq=-1, replays={})

    @classmethod
    def _from(cls, row: RunRow, seq: int, snapshot: BlobKey | None, read_log: ReadLog) -> HeldRun:
        ops = {op.seq_id: op for op in read_log(row.run_id, seq)}
        recovery = plan_recovery(row.run_id, seq, snapshot, [Logged(op.seq_id, op.kind) for op in ops.values()])
        return cls(
            row=row,
            snapshot=recovery.snapshot,
            snapshot_seq=seq,
            applied_seq=recovery.applied_seq,
            replays={replayed: ops[replayed] for replayed in recovery.replays},
        )

    def snapshot_failed(self) -> float:
        """It is tried again after a pause; its seconds."""
        self.retry_s = min(LAST_RETRY_S, max(FIRST_RETRY_S, 2 * self.retry_s))
        self.not_before = time.monotonic() + self.retry_s
        return self.retry_s
