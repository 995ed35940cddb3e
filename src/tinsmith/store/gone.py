"""Runs that are let go: because nobody has touched them for long, or by their owner's hand.

A run goes in two steps. First its row says so, in one transaction: from then on every request is told what happened, it
is in no list and counts for no quota. Then, once no worker holds it, its files are buried and its log is dropped, a
little at a time; what is left is its row, so that its place is never taken by another run. What stays true:

* No run goes that has a request under way, or a checkpoint that lives. Requests that wait for earlier ones are under
  way as long as these may still arrive; after that they fail with the run.
* What it cost stays in the ledger, and its samplers are what they were: each has a file of its own.
* A death at any moment leaves a run that is either there or going, and the next round goes on.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import JSON, Connection, and_, bindparam, delete, exists, func, literal_column, or_, select, update

from tinsmith.crashpoints import crash_point
from tinsmith.errors import GoneError, NotFoundError, UserError
from tinsmith.store.audit import note
from tinsmith.store.database import Database
from tinsmith.store.fences import HAS_PROMISED, IS_QUEUED, IS_RUNNING
from tinsmith.store.graveyard import bury
from tinsmith.store.ledger import end_span
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import Principal
from tinsmith.store.schema import checkpoints, ops, replays, runs, sessions, spans
from tinsmith.types import OpState, RunId, RunStatus, TenantId

DELETED, IDLE = "deleted", "idle"
LATELY_S = 900.0  # for longer no client tries to send a request that others of its run wait for
CHECKPOINTS_AT_ONCE = 200  # of one transaction
CLEARED_AT_ONCE = 64  # requests of one transaction
DAY_S = 86400.0

_IS_GONE = runs.c.status == literal_column(f"'{RunStatus.GONE.value}'")
_WHY = Prepared(
    select(runs.c.gone_at, runs.c.gone_why, runs.c.last_request_at).where(
        runs.c.run_id == bindparam("run_id"), _IS_GONE
    )
)
_GONE_AMONG = Prepared(
    select(runs.c.run_id).where(
        runs.c.run_id.in_(select(func.json_each(bindparam("run_ids", type_=JSON)).table_valued("value").c.value)),
        _IS_GONE,
    )
)
_IS_OPEN = exists().where(
    ops.c.run_id == runs.c.run_id,
    or_(
        IS_RUNNING,
        and_(IS_QUEUED, or_(ops.c.seq_id <= runs.c.head_seq, runs.c.last_request_at > bindparam("lately"))),
    ),
)
_RUN = (
    select(runs.c.run_id, _IS_OPEN.correlate(runs).label("is_open"), HAS_PROMISED.label("has_promised"))
    .where(runs.c.run_id == bindparam("run_id"), runs.c.tenant_id == bindparam("tenant_id"))
    .with_for_update()
)
_LIVES = or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > bindparam("now"))
_CHECKPOINTS = select(checkpoints.c.kind, checkpoints.c.name, checkpoints.c.blob, _LIVES.label("lives")).where(
    checkpoints.c.run_id == bindparam("of_run")
)
_DROP_ONE = Prepared(
    delete(checkpoints).where(
        checkpoints.c.run_id == bindparam("of_run"),
        checkpoints.c.kind == bindparam("of_kind"),
        checkpoints.c.name == bindparam("of_name"),
    )
)
_DROP_CHECKPOINTS = delete(checkpoints).where(checkpoints.c.run_id == bindparam("of_run"))
_MARK = (
    update(runs)
    .where(runs.c.run_id == bindparam("of_run"))
    .values(
        status=RunStatus.GONE.value, gone_at=bindparam("now"), gone_why=bindparam("why"), cleared_at=None,
        wants_worker=False,
    )
)  # fmt: skip
_FAIL_EARLY = (
    update(ops)
    .where(ops.c.run_id == bindparam("of_run"), IS_QUEUED)
    .values(
        state=OpState.FAILED.value, finished_at=bindparam("now"), failure_code=GoneError.code,
        failure_category=GoneError.category, failure_message=bindparam("message"),
    )
)  # fmt: skip
_IDLE = (
    select(runs.c.tenant_id, runs.c.run_id)
    .join(sessions, sessions.c.session_id == runs.c.session_id)
    .where(
        runs.c.run_id > bindparam("above"),
        runs.c.last_request_at < bindparam("before"),
        ~_IS_GONE,
        runs.c.lease_owner.is_(None),
        runs.c.wants_worker.is_(False),
        sessions.c.finished_at < bindparam("before"),
        ~_IS_OPEN.correlate(runs),
        ~HAS_PROMISED,
        ~exists()
        .where(spans.c.run_id == runs.c.run_id, or_(spans.c.until.is_(None), spans.c.until > bindparam("before")))
        .correlate(runs),
        ~exists().where(checkpoints.c.run_id == runs.c.run_id, _LIVES).correlate(runs),
    )
    .order_by(runs.c.run_id)
    .limit(bindparam("limit"))
)
_IS_GOING = (
    select(runs.c.snapshot_blob, runs.c.snapshot_bytes, runs.c.previous_blob, runs.c.previous_bytes)
    .where(runs.c.run_id == bindparam("run_id"), _IS_GONE, runs.c.cleared_at.is_(None), runs.c.lease_owner.is_(None))
    .with_for_update()
)
_DROP_STATE = (
    update(runs)
    .where(runs.c.run_id == bindparam("of_run"))
    .values(
        snapshot_seq=-1, snapshot_blob=None, snapshot_bytes=0, previous_seq=-1, previous_blob=None, previous_bytes=0,
        pruned_seq=runs.c.max_seq,
    )
)  # fmt: skip
_UNPIN = update(ops).where(ops.c.run_id == bindparam("of_run"), ops.c.pin_blob.is_not(None)).values(pin_blob=None)
_FORGET_REPLAYS = delete(replays).where(
    replays.c.op_id.in_(select(ops.c.op_id).where(ops.c.run_id == bindparam("of_run")))
)
_PAGE = (
    select(ops.c.num, ops.c.payload_blob)
    .where(ops.c.run_id == bindparam("of_run"), or_(ops.c.payload.is_not(None), ops.c.payload_blob.is_not(None)))
    .limit(CLEARED_AT_ONCE)
)
_FORGET_PAYLOADS = (
    update(ops).where(ops.c.num.in_(bindparam("nums", expanding=True))).values(payload=None, payload_blob=None)
)
_ALL_OPS = ops.alias("all_ops")
_IS_DROPPABLE = and_(ops.c.is_expired, ops.c.num < select(func.max(_ALL_OPS.c.num)).scalar_subquery())
_DROPPABLE = select(ops.c.num).where(ops.c.run_id == bindparam("of_run"), _IS_DROPPABLE).limit(CLEARED_AT_ONCE)
_NEEDS_CLEARING = or_(
    runs.c.snapshot_blob.is_not(None),
    runs.c.previous_blob.is_not(None),
    exists()
    .where(
        ops.c.run_id == runs.c.run_id,
        or_(ops.c.payload.is_not(None), ops.c.payload_blob.is_not(None), ops.c.pin_blob.is_not(None), _IS_DROPPABLE),
    )
    .correlate(runs),
    ~exists().where(ops.c.run_id == runs.c.run_id).correlate(runs),
)
_GOING = (
    select(runs.c.run_id)
    .where(
        runs.c.gone_at.is_not(None),
        runs.c.cleared_at.is_(None),
        runs.c.lease_owner.is_(None),
        runs.c.run_id > bindparam("above"),
        _NEEDS_CLEARING,
    )
    .order_by(runs.c.run_id)
    .limit(bindparam("limit"))
)
_DROP = delete(ops).where(ops.c.num.in_(bindparam("nums", expanding=True)))
_HAS_OPS = select(ops.c.num).where(ops.c.run_id == bindparam("of_run")).limit(1)
_SET_CLEARED = update(runs).where(runs.c.run_id == bindparam("of_run")).values(cleared_at=bindparam("now"))


class GoneRuns:
    def __init__(self, database: Database) -> None:
        self._database = database

    def idle(self, before: float, now: float, above: RunId, limit: int) -> list[tuple[TenantId, RunId]]:
        """Runs that may be let go: nobody has asked for anything of them since `before` (unix seconds), their sessions
        had ended by then, and so had the lives of all their checkpoints. By id, after `above`."""
        values = {"before": before, "now": now, "above": above, "limit": limit, "lately": now - LATELY_S}
        with self._database.read() as conn:
            return [(row.tenant_id, row.run_id) for row in conn.execute(_IDLE, values)]

    def let_go(self, tenant_id: TenantId, run_id: RunId, before: float, now: float) -> bool:
        """Begin to let a run of `idle` go; False: somebody has touched it meanwhile."""
        values = {"before": before, "now": now, "above": "", "limit": 1, "lately": now - LATELY_S}
        with self._database.write() as conn:
            if conn.execute(_IDLE.where(runs.c.run_id == bindparam("one")), {**values, "one": run_id}).first() is None:
                return False
            _drop_checkpoints(conn, run_id, now)
            _mark(conn, tenant_id, run_id, IDLE, None, now)
            crash_point("gone.before_mark_commit")
        return True

    def delete(
        self, tenant_id: TenantId, run_id: RunId, *, with_checkpoints: bool, by: Principal, now: float | None = None
    ) -> None:
        """Begin to delete a run, at its owner's wish. `by` stands in the audit log.

        Raises:
            NotFoundError: the run is not the tenant's.
            GoneError: it has gone already.
            UserError: it has requests under way, or checkpoints, and `with_checkpoints` is not asked for.
        """
        now = time.time() if now is None else now
        while with_checkpoints and self._delete_some(tenant_id, run_id, by, now):
            pass
        with self._database.write() as conn:
            row = conn.execute(_RUN, {"run_id": run_id, "tenant_id": tenant_id, "lately": now - LATELY_S}).first()
            if row is None:
                raise NotFoundError(f"no training run {run_id}")
            require_there(conn, run_id)
            if row.is_open or row.has_promised:
                raise UserError(f"{run_id} has requests that wait or run: delete it once they have ended")
            living = [kept for kept in conn.execute(_CHECKPOINTS, {"of_run": run_id, "now": now}) if kept.lives]
            if living and not with_checkpoints:
                raise UserError(
                    f"{run_id} has {len(living)} checkpoints: delete them first, or ask with with_checkpoints=true for "
                    "all of them to be deleted with it"
                )
            for kept in living:
                _note_deleted(conn, tenant_id, run_id, kept, by, now)
            _drop_checkpoints(conn, run_id, now)
            _mark(conn, tenant_id, run_id, DELETED, by, now)
            crash_point("gone.before_mark_commit")

    def _delete_some(self, tenant_id: TenantId, run_id: RunId, by: Principal, now: float) -> bool:
        """Delete checkpoints of a run that can be deleted, so that no transaction is long; whether there are more."""
        with self._database.write() as conn:
            row = conn.execute(_RUN, {"run_id": run_id, "tenant_id": tenant_id, "lately": now - LATELY_S}).first()
            if row is None or row.is_open or row.has_promised:
                return False
            found = conn.execute(_CHECKPOINTS.limit(CHECKPOINTS_AT_ONCE + 1), {"of_run": run_id, "now": now}).all()
            if len(found) <= CHECKPOINTS_AT_ONCE:
                return False
            page = found[:CHECKPOINTS_AT_ONCE]
            for kept in page:
                if kept.lives:
                    _note_deleted(conn, tenant_id, run_id, kept, by, now)
                end_span(conn, {"of_run": run_id, "of_kind": kept.kind, "of_name": kept.name}, now, now)
            bury(conn, [kept.blob for kept in page], now)
            named = [{"of_run": run_id, "of_kind": kept.kind, "of_name": kept.name} for kept in page]
            _DROP_ONE.run_many(conn, named)
        return True

    def among(self, run_ids: Collection[RunId]) -> set[RunId]:
        """Those of the runs that were let go. Give at most some 10000 at once."""
        with self._database.read() as conn:
            return {run_id for (run_id,) in _GONE_AMONG.all(conn, {"run_ids": [*run_ids]})}

    def going(self, above: RunId, limit: int) -> Sequence[RunId]:
        """Runs that were let go, that no worker holds, and of which something can be cleared now; by id, after `above`.

        Those that only wait for results to expire are left out: many of them would keep others from their turn.
        """
        with self._database.read() as conn:
            return list(conn.execute(_GOING, {"above": above, "limit": limit}).scalars())

    def clear(self, run_id: RunId, now: float) -> int:
        """Bury the files of a run that is going and drop its log, as far as its results have expired.

        Returns:
            The bytes of its snapshots that this took out of use.
        """
        freed = 0
        with self._database.write() as conn:
            row = conn.execute(_IS_GOING, {"run_id": run_id}).first()
            if row is None:
                return 0
            if row.snapshot_blob is not None or row.previous_blob is not None:
                freed = row.snapshot_bytes + row.previous_bytes
                bury(conn, [row.snapshot_blob, row.previous_blob], now)
            conn.execute(_DROP_STATE, {"of_run": run_id})
            conn.execute(_UNPIN, {"of_run": run_id})
            conn.execute(_FORGET_REPLAYS, {"of_run": run_id})
            crash_point("gone.before_clear_commit")
        crash_point("gone.after_state")
        while self._clear_some(run_id, now):
            crash_point("gone.half_cleared")
        return freed

    def _clear_some(self, run_id: RunId, now: float) -> bool:
        """Whether there may be more to do now."""
        with self._database.write() as conn:
            page = conn.execute(_PAGE, {"of_run": run_id}).all()
            if page:
                bury(conn, [row.payload_blob for row in page], now)
                conn.execute(_FORGET_PAYLOADS, {"nums": [row.num for row in page]})
                return True
            nums = list(conn.execute(_DROPPABLE, {"of_run": run_id}).scalars())
            if nums:
                conn.execute(_DROP, {"nums": nums})
                return True
            if conn.execute(_HAS_OPS, {"of_run": run_id}).first() is None:
                conn.execute(_SET_CLEARED, {"of_run": run_id, "now": now})
        return False


def require_there(conn: Connection, run_id: RunId) -> None:
    """Raises: GoneError: the run was let go; the message says when and why."""
    row = _WHY.first(conn, {"run_id": run_id})
    if row is not None:
        raise GoneError(_say(run_id, *row))


def _say(run_id: RunId, gone_at: float, why: str, last_request_at: float) -> str:
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(gone_at))
    if why == DELETED:
        return f"the run {run_id} was deleted on {when}: make a new one"
    days = (gone_at - last_request_at) / DAY_S
    return (
        f"the run {run_id} was let go on {when}, since nobody had asked for anything of it for {days:.0f} days and it "
        "had no checkpoint: make a new one, and save a checkpoint of what is to be kept"
    )


def _note_deleted(conn: Connection, tenant_id: TenantId, run_id: RunId, kept: Any, by: Principal, now: float) -> None:
    path = f"tinker://{run_id}/{kept.kind}/{kept.name}"
    note(conn, "checkpoint_delete", tenant_id, by, {"model_id": run_id, "tinker_path": path}, now)


def _drop_checkpoints(conn: Connection, run_id: RunId, now: float) -> None:
    rows = conn.execute(_CHECKPOINTS, {"of_run": run_id, "now": now}).all()
    for kept in rows:
        end_span(conn, {"of_run": run_id, "of_kind": kept.kind, "of_name": kept.name}, now, now)
    bury(conn, [kept.blob for kept in rows], now)
    conn.execute(_DROP_CHECKPOINTS, {"of_run": run_id})


def _mark(conn: Connection, tenant_id: TenantId, run_id: RunId, why: str, by: Principal | None, now: float) -> None:
    conn.execute(_MARK, {"of_run": run_id, "now": now, "why": why})
    what = "deleted" if why == DELETED else "let go"
    early = f"the run {run_id} was {what}; this request waited for earlier ones of it, which never arrived"
    conn.execute(_FAIL_EARLY, {"of_run": run_id, "now": now, "message": early})
    act = "project_run_delete" if why == DELETED else "project_run_let_go"
    details: dict[str, Any] = {"model_id": run_id}
    note(conn, act, tenant_id, by, details, now)
