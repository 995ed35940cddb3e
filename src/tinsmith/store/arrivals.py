"""How a request becomes a row: deduplication, and the contiguous prefix of a run's log.

Works within the caller's transaction, which is alone (see database.py); the run's row is locked first where a dialect
needs that. What stays true:

* The first request with a (run, seq_id) or (sampler, seq_id) is the one; every later one is answered with its row.
* `runs.head_seq` is the highest seq_id up to which nothing is missing; rejected ops count as arrived. A request at or
  below it whose row is gone was carried out long ago, and its result has expired.
* A free run whose prefix grew says so in `wants_worker`.
"""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, insert, select, update

from tinsmith.errors import GoneError, NotFoundError
from tinsmith.store.endings import number_ends
from tinsmith.store.gone import require_there
from tinsmith.store.graveyard import bury
from tinsmith.store.op_rows import NEW_COLUMNS, WHOLE, born, to_columns, to_op
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import Enqueued, NewOp, NewRun, OpRow
from tinsmith.store.run_rows import new_run_columns
from tinsmith.store.schema import ops, runs, samplers, sessions
from tinsmith.types import RunId

WALK = 256

_RUN = Prepared(
    select(runs.c.head_seq, runs.c.max_seq, runs.c.lease_owner, runs.c.wants_worker, runs.c.gone_at)
    .where(runs.c.run_id == bindparam("run_id"), runs.c.tenant_id == bindparam("tenant_id"))
    .with_for_update()
)
_SAMPLER = Prepared(
    select(samplers.c.sampler_id).where(
        samplers.c.sampler_id == bindparam("sampler_id"), samplers.c.tenant_id == bindparam("tenant_id")
    )
)
_SESSION = (
    select(sessions.c.finished_at, sessions.c.finish_reason)
    .where(sessions.c.session_id == bindparam("session_id"), sessions.c.tenant_id == bindparam("tenant_id"))
    .with_for_update()
)
_OP_OF_RUN = Prepared(select(*WHOLE).where(ops.c.run_id == bindparam("run_id"), ops.c.seq_id == bindparam("seq_id")))
_OP_OF_SAMPLER = Prepared(
    select(*WHOLE).where(ops.c.sampler_id == bindparam("sampler_id"), ops.c.seq_id == bindparam("seq_id"))
)
_INSERT_OP = Prepared(insert(ops).inline(), NEW_COLUMNS)
_INSERT_RUN = insert(runs).inline()
_HAS_RUN = select(runs.c.run_id).where(runs.c.run_id == bindparam("run_id"))
_ADVANCE = Prepared(
    update(runs)
    .where(runs.c.run_id == bindparam("id"))
    .values(
        head_seq=bindparam("head"), max_seq=bindparam("max"), last_request_at=bindparam("now"),
        wants_worker=bindparam("wants"),
    )
)  # fmt: skip
_ARRIVED = (
    select(ops.c.seq_id)
    .where(ops.c.run_id == bindparam("run_id"), ops.c.seq_id > bindparam("above"))
    .order_by(ops.c.seq_id)
    .limit(WALK)
)


def arrive(conn: Connection, new: NewOp, now: float) -> Enqueued:
    """Insert the op, or find the one that holds its seq_id.

    Raises:
        NotFoundError: its run or sampler is not the tenant's.
        GoneError: it came before, and its result has expired; or its run was let go.
    """
    if new.run_id is not None:
        return _arrive_in_run(conn, new, new.run_id, now)
    if _SAMPLER.first(conn, {"sampler_id": new.sampler_id, "tenant_id": new.tenant_id}) is None:
        raise NotFoundError(f"no sampler {new.sampler_id}")
    first = _OP_OF_SAMPLER.first(conn, {"sampler_id": new.sampler_id, "seq_id": new.seq_id})
    if first is not None:
        return Enqueued(to_op(first), is_new=False)
    return Enqueued(_insert(conn, new, now), is_new=True)


def arrive_with_run(conn: Connection, run: NewRun, new: NewOp, now: float) -> Enqueued:
    """Insert a run and its CREATE op, or find the op that made it. A rejected op makes no run.

    Raises:
        NotFoundError: the session is not the tenant's.
        GoneError: the session has ended; or the run was made before, and the result of that has expired.
    """
    session = conn.execute(_SESSION, {"session_id": run.session_id, "tenant_id": run.tenant_id}).first()
    if session is None:
        raise NotFoundError(f"no session {run.session_id}")
    first = _OP_OF_RUN.first(conn, {"run_id": run.spec.run_id, "seq_id": new.seq_id})
    if first is not None:
        op = to_op(first)
        if op.tenant_id != run.tenant_id:
            raise NotFoundError(f"no run {run.spec.run_id}")
        return Enqueued(op, is_new=False)
    if conn.execute(_HAS_RUN, {"run_id": run.spec.run_id}).first() is not None:
        require_there(conn, run.spec.run_id)
        raise GoneError(f"run {run.spec.run_id} was made before, and the result of that has expired: take a new number")
    if new.failure is None:
        if session.finished_at is not None:
            raise GoneError(f"session {run.session_id} has ended ({session.finish_reason}): make a new ServiceClient")
        conn.execute(_INSERT_RUN, {**new_run_columns(run, now), "key_id": new.key_id})
    return Enqueued(_insert(conn, new, now), is_new=True)


def _arrive_in_run(conn: Connection, new: NewOp, run_id: RunId, now: float) -> Enqueued:
    run = _RUN.first(conn, {"run_id": run_id, "tenant_id": new.tenant_id})
    if run is None:
        raise NotFoundError(f"no training run {run_id}")
    old_head, max_seq, lease_owner, wants_worker, gone_at = run
    if gone_at is not None:
        require_there(conn, run_id)
    if new.seq_id <= max_seq:
        first = _OP_OF_RUN.first(conn, {"run_id": run_id, "seq_id": new.seq_id})
        if first is not None:
            return Enqueued(to_op(first), is_new=False)
        if new.seq_id <= old_head:
            raise GoneError(f"request {new.seq_id} of {run_id} was carried out long ago, and its result has expired")
    row = _insert(conn, new, now)
    head = old_head
    if new.seq_id == head + 1:
        head = new.seq_id if new.seq_id >= max_seq else _contiguous(conn, run_id, new.seq_id)
    has_work = head > old_head and (new.failure is None or head > new.seq_id)
    advanced = {
        "id": run_id,
        "head": head,
        "max": max(max_seq, new.seq_id),
        "now": now,
        "wants": wants_worker or (lease_owner is None and has_work),
    }
    _ADVANCE.run(conn, advanced)
    return Enqueued(row, is_new=True)


def _contiguous(conn: Connection, run_id: RunId, head: int) -> int:
    """The end of the unbroken sequence that `head` belongs to."""
    while True:
        arrived = conn.execute(_ARRIVED, {"run_id": run_id, "above": head}).scalars().all()
        for seq_id in arrived:
            if seq_id != head + 1:
                return head
            head = seq_id
        if len(arrived) < WALK:
            return head


def _insert(conn: Connection, new: NewOp, now: float) -> OpRow:
    row = born(new, now)
    _INSERT_OP.run(conn, to_columns(row))
    if new.failure is not None and new.payload_blob is not None:
        bury(conn, [new.payload_blob], now)
    if new.failure is not None and new.sampler_id is not None:
        number_ends(conn, [(new.sampler_id, new.id)])
    return row
