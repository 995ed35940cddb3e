"""The two newest snapshots of a run, and what has to be replayable above them.

Works within the caller's transaction. What stays true: the ops above the snapshot before the newest keep their payloads
and what they read, so a run whose newest snapshot is damaged is computed again from that one; before there are two,
that is from its CREATE op.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, and_, bindparam, or_, select, update

from tinsmith.store.graveyard import bury
from tinsmith.store.schema import ops, runs
from tinsmith.types import BlobKey, OpState, RunId

PRUNED_AT_ONCE = 64  # ops of one transaction

_FINAL = [state.value for state in OpState if state.is_final]
_KEPT = select(
    runs.c.snapshot_seq, runs.c.snapshot_blob, runs.c.snapshot_bytes, runs.c.previous_seq, runs.c.previous_blob,
    runs.c.previous_bytes,
).where(runs.c.run_id == bindparam("run_id"))  # fmt: skip
_PUT = (
    update(runs)
    .where(runs.c.run_id == bindparam("of_run"))
    .values(
        snapshot_seq=bindparam("new_seq"),
        snapshot_blob=bindparam("new_blob"),
        snapshot_bytes=bindparam("new_bytes"),
        previous_seq=bindparam("old_seq"),
        previous_blob=bindparam("old_blob"),
        previous_bytes=bindparam("old_bytes"),
    )
)
_NOTE_DAMAGE = update(runs).where(runs.c.run_id == bindparam("of_run")).values(damaged_at=bindparam("now"))
_UNPIN = (
    update(ops)
    .where(ops.c.run_id == bindparam("of_run"), ops.c.seq_id <= bindparam("seq"), ops.c.pin_blob.is_not(None))
    .values(pin_blob=None)
)
_PRUNED = select(runs.c.pruned_seq, runs.c.previous_seq).where(runs.c.run_id == bindparam("run_id")).with_for_update()
_PRUNABLE = and_(
    ops.c.run_id == bindparam("of_run"),
    ops.c.seq_id > bindparam("above"),
    ops.c.seq_id <= bindparam("upto"),
    ops.c.state.in_(_FINAL),
)
_PRUNED_BLOBS = select(ops.c.payload_blob).where(_PRUNABLE, ops.c.payload_blob.is_not(None))
_PRUNE = (
    update(ops)
    .where(_PRUNABLE, or_(ops.c.payload.is_not(None), ops.c.payload_blob.is_not(None)))
    .values(payload=None, payload_blob=None)
)
_SET_PRUNED = update(runs).where(runs.c.run_id == bindparam("of_run")).values(pruned_seq=bindparam("upto"))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """seq: the highest op that it holds; -1, without a file, stands for the run before its CREATE op."""

    seq: int
    blob: BlobKey | None
    size: int


def put_snapshot(
    conn: Connection, run_id: RunId, new: Snapshot, now: float, *, is_newest_damaged: bool
) -> BlobKey | None:
    """See `Runs.record_snapshot`."""
    row = conn.execute(_KEPT, {"run_id": run_id}).one()
    newest, previous = Snapshot(*row[:3]), Snapshot(*row[3:])
    if new.seq < newest.seq:
        bury(conn, [new.blob] if new.blob != newest.blob else [], now)
        return None
    keeps_previous = is_newest_damaged or new.seq == newest.seq
    kept, gone = (previous, newest) if keeps_previous else (newest, previous)
    conn.execute(
        _PUT,
        {
            "of_run": run_id,
            "new_seq": new.seq,
            "new_blob": new.blob,
            "new_bytes": new.size,
            "old_seq": kept.seq,
            "old_blob": kept.blob,
            "old_bytes": kept.size,
        },
    )
    conn.execute(_UNPIN, {"of_run": run_id, "seq": kept.seq})
    if is_newest_damaged:
        conn.execute(_NOTE_DAMAGE, {"of_run": run_id, "now": now})
    return gone.blob


def prune_some(conn: Connection, run_id: RunId) -> tuple[list[BlobKey], bool]:
    """Forget some payloads that nobody will read again; (the files that held them, whether that was all)."""
    run = conn.execute(_PRUNED, {"run_id": run_id}).first()
    if run is None or run.previous_seq <= run.pruned_seq:
        return [], True
    upto = min(run.pruned_seq + PRUNED_AT_ONCE, run.previous_seq)
    span = {"of_run": run_id, "above": run.pruned_seq, "upto": upto}
    blobs = list(conn.execute(_PRUNED_BLOBS, span).scalars())
    conn.execute(_PRUNE, span)
    conn.execute(_SET_PRUNED, {"of_run": run_id, "upto": upto})
    return blobs, upto == run.previous_seq
