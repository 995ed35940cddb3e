"""From a run's row and its replayable ops to what must be loaded and computed again. Pure.

A run is a log. `snapshot_seq` says up to which op its state is on disk; every later op that changed the state is
computed again from its recorded payload, in order, among the ops that are still open. A result that was recorded once
is never replaced: the outcome of a replayed op is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinsmith.errors import CorruptError
from tinsmith.types import BlobKey, OpKind, RunId


@dataclass(frozen=True, slots=True)
class Logged:
    """One finished op of the log that changed the state, or made a sampler that is to be made again."""

    seq_id: int
    kind: OpKind


@dataclass(frozen=True, slots=True)
class Recovery:
    """`snapshot` is loaded first (None: the log starts from its CREATE op); then `replays`, lowest seq first."""

    snapshot: BlobKey | None
    applied_seq: int
    replays: tuple[int, ...]


def plan_recovery(run_id: RunId, snapshot_seq: int, snapshot: BlobKey | None, log: Sequence[Logged]) -> Recovery:
    """What brings the run from disk to the state that its log describes.

    Args:
        snapshot_seq: the highest op that the snapshot holds; -1 without one.
        log: finished ops to be carried out again, in any order.

    Raises:
        CorruptError: neither a snapshot nor the op that created the run is there.
    """
    replays = tuple(sorted(entry.seq_id for entry in log if entry.kind.is_replayed and entry.seq_id > snapshot_seq))
    if snapshot is None and snapshot_seq >= 0:
        raise CorruptError(f"run {run_id}: its snapshot up to request {snapshot_seq} has no file; restore a backup")
    if snapshot is None and replays and replays[0] != 0:
        raise CorruptError(f"run {run_id}: the request that created it is missing from its log; restore a backup")
    return Recovery(snapshot=snapshot, applied_seq=snapshot_seq, replays=replays)
