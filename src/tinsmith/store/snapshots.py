"""The two newest snapshots of a run, and what has to be replayable above them.

Works within the caller's transaction. What stays true: the ops above the snapshot before the newest keep their payloads
and what they read, so a run whose newest snapshot is damaged is computed again from that one; before there are two,
that is from its CREATE op.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, and_, bindparam, delete, func, literal_column, or_, select, update

from tinsmith.store.graveyard import bury
from tinsmith.store.prepared import Prepared
from tinsmith.store.schema import ops, runs, sessions
from tinsmith.types import BlobKey, OpState, RunId, TenantId

PRUNED_AT_ONCE = 64  # ops of one transaction

_KEPT = Prepared(
    select(
        runs.c.snapshot_seq, runs.c.snapshot_blob, runs.c.snapshot_bytes, runs.c.previous_seq, runs.c.previous_blob,
        runs.c.previous_bytes, runs.c.pruned_seq,
    ).where(runs.c.run_id == bindparam("run_id"))
)  # fmt: skip
_PUT = Prepared(
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
_UNPIN = Prepared(
    update(ops)
    .where(ops.c.run_id == bindparam("of_run"), ops.c.seq_id <= bindparam("seq"), ops.c.pin_blob.is_not(None))
    .values(pin_blob=None)
)
_PRUNED = Prepared(
    select(runs.c.pruned_seq, runs.c.previous_seq).where(runs.c.run_id == bindparam("run_id")).with_for_update()
)
_PRUNABLE = and_(
    ops.c.run_id == bindparam("of_run"),
    ops.c.seq_id > bindparam("above"),
    ops.c.seq_id <= bindparam("upto"),
    or_(*(ops.c.state == literal_column(f"'{state}'") for state in OpState if state.is_final)),
)
_ALL_OPS = ops.alias("all_ops")
_PRUNED_BLOBS = Prepared(select(ops.c.payload_blob).where(_PRUNABLE, ops.c.payload_blob.is_not(None)))
_PRUNE = Prepared(
    update(ops)
    .where(_PRUNABLE, or_(ops.c.payload.is_not(None), ops.c.payload_blob.is_not(None)))
    .values(payload=None, payload_blob=None)
)
_DROP = Prepared(
    delete(ops).where(
        _PRUNABLE,
        ops.c.is_expired.is_(True),
        ops.c.pin_blob.is_(None),
        ops.c.num < select(func.max(_ALL_OPS.c.num)).scalar_subquery(),
    )
)
_COLD = (
    select(runs.c.tenant_id, runs.c.run_id, runs.c.snapshot_seq, runs.c.snapshot_blob)
    .join(sessions, sessions.c.session_id == runs.c.session_id)
    .where(
        sessions.c.finished_at < bindparam("before"),
        runs.c.last_request_at < bindparam("before"),
        runs.c.lease_owner.is_(None),
        runs.c.wants_worker.is_(False),
        runs.c.snapshot_blob.is_not(None),
        runs.c.previous_seq < runs.c.snapshot_seq,
        runs.c.run_id > bindparam("above"),
    )
    .order_by(runs.c.run_id)
    .limit(bindparam("limit"))
)
_PUT_SPARE = Prepared(
    update(runs)
    .where(
        runs.c.run_id == bindparam("of_run"),
        runs.c.snapshot_blob == bindparam("newest"),
        runs.c.previous_seq < runs.c.snapshot_seq,
        runs.c.lease_owner.is_(None),
    )
    .values(previous_seq=runs.c.snapshot_seq, previous_blob=bindparam("spare"), previous_bytes=runs.c.snapshot_bytes)
)
_SET_PRUNED = Prepared(update(runs).where(runs.c.run_id == bindparam("of_run")).values(pruned_seq=bindparam("upto")))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """seq: the highest op that it holds; -1, without a file, stands for the run before its CREATE op."""

    seq: int
    blob: BlobKey | None
    size: int


@dataclass(frozen=True, slots=True)
class Cold:
    """A run that nobody has asked for anything for long, and its newest snapshot, whose size isn't looked up."""

    tenant_id: TenantId
    run_id: RunId
    newest: Snapshot


@dataclass(frozen=True, slots=True)
class Recorded:
    """gone: the file that this took out of use; previous: of the snapshot before; has_stale: there are payloads that
    nobody will read again."""

    gone: BlobKey | None
    previous: BlobKey | None
    has_stale: bool


def put_snapshot(conn: Connection, run_id: RunId, new: Snapshot, now: float, *, is_newest_damaged: bool) -> Recorded:
    """See `Runs.record_snapshot`."""
    row = _KEPT.first(conn, {"run_id": run_id})
    newest, previous, pruned_seq = Snapshot(*row[:3]), Snapshot(*row[3:6]), row[6]
    if new.seq < newest.seq:
        bury(conn, [new.blob] if new.blob != newest.blob else [], now)
        return Recorded(None, previous.blob, has_stale=False)
    keeps_previous = is_newest_damaged or new.seq == newest.seq
    kept, gone = (previous, newest) if keeps_previous else (newest, previous)
    _PUT.run(
        conn,
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
    _UNPIN.run(conn, {"of_run": run_id, "seq": kept.seq})
    if is_newest_damaged:
        conn.execute(_NOTE_DAMAGE, {"of_run": run_id, "now": now})
    return Recorded(gone.blob, kept.blob, has_stale=kept.seq > pruned_seq)


def cold_runs(conn: Connection, before: float, above: RunId, limit: int) -> list[Cold]:
    """Runs without a holder whose session has ended, and of which nothing was asked since that time; by id, after
    `above`. Left out are those whose two snapshots hold the same already."""
    rows = conn.execute(_COLD, {"before": before, "above": above, "limit": limit})
    return [Cold(row.tenant_id, row.run_id, Snapshot(row.snapshot_seq, row.snapshot_blob, 0)) for row in rows]


def put_spare(conn: Connection, cold: Cold, spare: BlobKey, now: float) -> bool:
    """`spare`, a copy of the run's newest snapshot, takes the place of the snapshot before it, which is buried. False,
    and nothing has changed: the run has gone on meanwhile."""
    row = _KEPT.first(conn, {"run_id": cold.run_id})
    if row is None or not _PUT_SPARE.run(conn, {"of_run": cold.run_id, "newest": cold.newest.blob, "spare": spare}):
        return False
    bury(conn, [row[4]], now)
    _UNPIN.run(conn, {"of_run": cold.run_id, "seq": cold.newest.seq})
    return True


def prune_some(conn: Connection, run_id: RunId) -> tuple[list[BlobKey], bool]:
    """Forget some payloads that nobody will read again; (the files that held them, whether that was all)."""
    run = _PRUNED.first(conn, {"run_id": run_id})
    if run is None:
        return [], True
    pruned_seq, previous_seq = run
    if previous_seq <= pruned_seq:
        return [], True
    upto = min(pruned_seq + PRUNED_AT_ONCE, previous_seq)
    span = {"of_run": run_id, "above": pruned_seq, "upto": upto}
    blobs = [blob for (blob,) in _PRUNED_BLOBS.all(conn, span)]
    _PRUNE.run(conn, span)
    _DROP.run(conn, span)
    _SET_PRUNED.run(conn, {"of_run": run_id, "upto": upto})
    return blobs, upto == previous_seq
