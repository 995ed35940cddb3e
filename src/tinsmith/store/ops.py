"""The queue: requests from their acknowledgement to their outcome.

Owns every change of an op's state, but for cancelling (endings.py). What stays true:

* queued ▸ running ▸ done | failed; only a clean stop or a takeover leads back from running to queued. A sample may be
  cancelled in either.
* A final op never changes again: its result is written once, and expires as a whole.
* A worker's write is one transaction, checked against its incarnation and its leases; fenced, it writes nothing.

Which payloads are worth keeping follows from replay: those of DONE ops with an effect above the run's snapshot before
the newest (snapshots.py). All others are forgotten as soon as the op is final.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from msgspec.structs import replace as replace_in
from sqlalchemy import JSON, bindparam, delete, exists, func, literal_column, or_, select, update

from tinsmith.crashpoints import crash_point
from tinsmith.errors import CorruptError, GoneError, NotFoundError, UserError
from tinsmith.store.arrivals import arrive, arrive_with_run
from tinsmith.store.checksums import row_changed, whole_row
from tinsmith.store.database import Database
from tinsmith.store.fences import IS_QUEUED, IS_RUNNING, blame, require_current
from tinsmith.store.graveyard import bury
from tinsmith.store.op_rows import IS_SPENT, WHOLE, WITH_PAYLOAD, WITH_RESULT, are_words_known, to_op
from tinsmith.store.outcomes import record
from tinsmith.store.prepared import Prepared, readable
from tinsmith.store.quota_gates import reopen
from tinsmith.store.quotas import Quotas
from tinsmith.store.rows import Enqueued, Finished, NewOp, NewRun, OpRow, WorkerId
from tinsmith.store.schema import ops, runs, samplers
from tinsmith.types import OpId, OpKind, OpState, RunId, TenantId

COUNT_AHEAD = 1000

FINAL = [state.value for state in OpState if state.is_final]
EFFECTS = [kind.value for kind in OpKind if kind.has_effect]

_GET = Prepared(
    select(*WHOLE, ops.c.is_expired).where(ops.c.op_id == bindparam("op_id"), ops.c.tenant_id == bindparam("tenant_id"))
)
# A run is looked up for each op, and not the ops of each run: a worker may hold thousands that are idle.
_IS_HELD = exists().where(runs.c.run_id == ops.c.run_id, runs.c.lease_owner == bindparam("slot")).correlate(ops)
_CLAIM = Prepared(
    update(ops)
    .where(
        ops.c.op_id == bindparam("id"),
        IS_QUEUED,
        or_(ops.c.run_id.is_(None), ops.c.kind == literal_column(f"'{OpKind.SAMPLE}'"), _IS_HELD),
    )
    .values(
        state=OpState.RUNNING.value, owner=bindparam("slot"), attempts=ops.c.attempts + 1, started_at=bindparam("now")
    )
    .returning(*WITH_PAYLOAD)
)
_UNCLAIM = (
    update(ops)
    .where(ops.c.op_id.in_(bindparam("op_ids", expanding=True)), IS_RUNNING, ops.c.owner == bindparam("slot"))
    .values(state=OpState.QUEUED.value, attempts=ops.c.attempts - 1, started_at=None)
)
_BLAMES = select(ops.c.op_id, blame(ops.c.attempts, ops.c.excused)).where(
    ops.c.op_id.in_(bindparam("op_ids", expanding=True))
)
_MADE_A_PROMISE = (ops.c.kind == OpKind.SAVE_SAMPLER.value) & exists().where(
    samplers.c.run_id == ops.c.run_id, samplers.c.promised_seq == ops.c.seq_id
)
_FINAL_AMONG = Prepared(
    select(ops.c.op_id).where(
        ops.c.op_id.in_(select(func.json_each(bindparam("op_ids", type_=JSON)).table_valued("value").c.value)),
        or_(*(ops.c.state == literal_column(f"'{state}'") for state in FINAL)),
    )
)
_ENDED_SINCE = Prepared(select(ops.c.op_id).where(ops.c.finished_at > bindparam("since"), ops.c.is_expired.is_(False)))
_OUTCOME = Prepared(select(*WITH_RESULT).where(ops.c.op_id == bindparam("op_id")))
_REPLAYABLE = (
    select(*WITH_PAYLOAD)
    .where(
        ops.c.run_id == bindparam("run_id"),
        ops.c.seq_id > bindparam("above"),
        or_(ops.c.state == OpState.DONE.value, ops.c.state.not_in([state.value for state in OpState])),
        or_(ops.c.kind.in_(EFFECTS), _MADE_A_PROMISE, ops.c.kind.not_in([kind.value for kind in OpKind])),
    )
    .order_by(ops.c.seq_id)
)
_LACKS = select(runs.c.head_seq).where(
    runs.c.run_id == bindparam("run_id"),
    runs.c.gone_at.is_(None),
    runs.c.head_seq - bindparam("above")
    > select(func.count())
    .select_from(ops)
    .where(ops.c.run_id == runs.c.run_id, ops.c.seq_id > bindparam("above"), ops.c.seq_id <= runs.c.head_seq)
    .correlate(runs)
    .scalar_subquery(),
)
_PLACE = Prepared(
    select(ops.c.num, ops.c.base_model, ops.c.seq_id, ops.c.state, runs.c.head_seq)
    .outerjoin(runs, runs.c.run_id == ops.c.run_id)
    .where(ops.c.op_id == bindparam("op_id"))
)
_AHEAD = Prepared(
    select(func.count()).select_from(
        select(ops.c.num)
        .where(
            ops.c.base_model == bindparam("base"),
            ops.c.kind.in_([literal_column(f"'{kind}'") for kind in OpKind]),  # for the queue's index
            ops.c.num < bindparam("num"),
            IS_QUEUED,
        )
        .limit(literal_column(str(COUNT_AHEAD)))
        .subquery()
    )
)
_STALE = (
    select(ops.c.num, ops.c.result_blob, ops.c.routes_blob, IS_SPENT.label("is_spent"))
    .outerjoin(runs, runs.c.run_id == ops.c.run_id)
    .where(ops.c.finished_at < bindparam("before"), ops.c.is_expired.is_(False), ops.c.finished_at.is_not(None))
    .order_by(ops.c.finished_at)
    .limit(bindparam("limit"))
)
_EXPIRE = (
    update(ops)
    .where(ops.c.num.in_(bindparam("nums", expanding=True)))
    .values(is_expired=True, result=None, result_blob=None, routes_blob=None, routes_bytes=None)
)
_DROP = delete(ops).where(ops.c.num.in_(bindparam("nums", expanding=True)))


class Ops:
    def __init__(self, database: Database, quotas: Quotas | None = None) -> None:
        """`quotas` judge what is claimed; None: there are none."""
        self._database = database
        self._quotas = quotas or Quotas(database)

    def enqueue(self, new: NewOp, now: float) -> Enqueued:
        """Acknowledge a request. One with a seq_id that is taken gets the first one's row, untouched.

        With `new.failure` the op is born FAILED: it consumes its seq_id and has no effect. Moves the run's head over
        all that has arrived without a gap, and touches its `last_request_at`.

        Raises:
            NotFoundError: the run or sampler is not the tenant's, or doesn't exist.
            GoneError: it came before, and its result has expired.
            ValueError: not exactly one of run_id and sampler_id is set.
        """
        (enqueued,) = self.enqueue_all([new], now)
        if isinstance(enqueued, UserError):
            raise enqueued
        return enqueued

    def enqueue_all(
        self, news: Sequence[NewOp], now: float, *, may_wait: bool = True
    ) -> list[Enqueued | NotFoundError | GoneError]:
        """The same for several requests in one transaction, in this order. One that is refused leaves no trace and
        keeps no other from being acknowledged.

        Raises:
            TakenError: others are writing, and this may not wait for them; nothing was recorded.
            ValueError: not exactly one of run_id and sampler_id is set; nothing was recorded.
        """
        if any((new.run_id is None) == (new.sampler_id is None) for new in news):
            raise ValueError("an op belongs to a run or to a sampler")
        enqueued: list[Enqueued | NotFoundError | GoneError] = []
        with self._database.write(may_wait=may_wait) as conn:
            for new in news:
                try:
                    enqueued.append(arrive(conn, new, now))
                except (NotFoundError, GoneError) as error:  # raised before anything is written
                    enqueued.append(error)
            crash_point("store.before_enqueue_commit")
        crash_point("store.after_enqueue_commit")
        return enqueued

    def create_run(self, run: NewRun, op: NewOp, now: float) -> Enqueued:
        """A run and its CREATE op (seq_id 0) in one transaction; the run's id again gets the first op's row.

        With `op.failure` there's the op, but no run: later requests of that run are not found.

        Raises:
            NotFoundError: the session is not the tenant's.
            GoneError: the session has ended, or the run was made long ago.
            ValueError: `op` isn't the run's op with seq_id 0.
        """
        if op.seq_id != 0 or op.run_id != run.spec.run_id or op.tenant_id != run.tenant_id or op.sampler_id is not None:
            raise ValueError("a run is created by its own op with seq_id 0")
        with self._database.write() as conn:
            enqueued = arrive_with_run(conn, run, op, now)
            crash_point("store.before_enqueue_commit")
        crash_point("store.after_enqueue_commit")
        return enqueued

    def get(self, tenant_id: TenantId, op_id: OpId) -> OpRow:
        """Raises: GoneError: no such op of this tenant, or its result has expired."""
        (found,) = self.get_all([(tenant_id, op_id)])
        if isinstance(found, Exception):
            raise found
        return found

    def get_all(self, wanted: Sequence[tuple[TenantId, OpId]]) -> list[OpRow | GoneError]:
        """`get` for several, in one view. A row that was changed on the disk keeps no other from being read."""
        with self._database.read() as conn:
            rows = [_GET.first(conn, {"op_id": op_id, "tenant_id": tenant_id}) for tenant_id, op_id in wanted]
        return [_found(op_id, row) for (_, op_id), row in zip(wanted, rows, strict=True)]

    def claim(self, worker: WorkerId, op_ids: Sequence[OpId], now: float) -> list[OpRow]:
        """QUEUED ▸ RUNNING in one transaction; those that were claimed, with payload, in the order of `op_ids`.

        Left out are ops that aren't queued any more, ops of runs that this worker doesn't hold, and those that a quota
        holds back, with what comes after them in their run.

        Raises:
            FencedError: the worker's place was taken.
        """
        if not op_ids:
            return []
        with self._database.write(is_durable=False) as conn:
            require_current(conn, worker)
            allowed = self._quotas.admissible(conn, op_ids, now)
            rows = [_CLAIM.first(conn, {"id": op_id, "slot": worker.slot, "now": now}) for op_id in allowed]
            claimed = [to_op(row) for row in rows if row is not None]
            reopen(conn, claimed, now)
            crash_point("store.before_claim_commit")
        crash_point("store.after_claim")
        return claimed

    def finish(self, worker: WorkerId, finished: Sequence[Finished], now: float) -> list[OpId]:
        """Record outcomes and the rows that come with them, in one transaction; the ids that were not final before.

        Raises:
            FencedError: the worker's place was taken, it doesn't hold an op's run, or it didn't claim an op.
            NotFoundError: no such op.
            ValueError: an outcome that is neither DONE nor FAILED with a failure.
        """
        if not finished:
            return []
        with self._database.write() as conn:
            new = record(conn, worker, finished, now)
            crash_point("store.before_finish_commit")
        crash_point("store.after_finish_commit")
        return new

    def unclaim(self, worker: WorkerId, op_ids: Sequence[OpId]) -> None:
        """RUNNING ▸ QUEUED, as if they had not been claimed (`attempts` goes back too).

        Raises:
            FencedError: the worker's place was taken.
        """
        if not op_ids:
            return
        with self._database.write() as conn:
            require_current(conn, worker)
            conn.execute(_UNCLAIM, {"op_ids": list(op_ids), "slot": worker.slot})

    def blames(self, op_ids: Collection[OpId]) -> dict[OpId, int]:
        """Attempts of each op less those that somebody outside put an end to."""
        with self._database.read() as conn:
            return {row[0]: row[1] for row in conn.execute(_BLAMES, {"op_ids": list(op_ids)})}

    def final_among(self, op_ids: Collection[OpId]) -> set[OpId]:
        """Those of `op_ids` that have an outcome. Give at most some 10000 at once."""
        if not op_ids:
            return set()
        with self._database.read() as conn:
            return {op_id for (op_id,) in _FINAL_AMONG.all(conn, {"op_ids": list(op_ids)})}

    def ended_among(self, op_ids: Collection[OpId]) -> dict[OpId, OpRow]:
        """Those of `op_ids` that have an outcome, with it, and without their payloads."""
        if not op_ids:
            return {}
        with self._database.read() as conn:
            final = _FINAL_AMONG.all(conn, {"op_ids": list(op_ids)})
            return {op_id: to_op(_OUTCOME.first(conn, {"op_id": op_id})) for (op_id,) in final}

    def ended_since(self, since: float) -> list[OpId]:
        """Those that have had an outcome from that time on, by the clock of whoever recorded it."""
        with self._database.read() as conn:
            return [op_id for (op_id,) in _ENDED_SINCE.all(conn, {"since": since})]

    def replayable(self, run_id: RunId, above_seq: int) -> list[OpRow]:
        """DONE ops above `above_seq` that changed the run's state, or made a sampler whose file isn't written yet; by
        seq, with payload.

        Raises:
            CorruptError: a row of them was changed on the disk, or one that arrived above `above_seq` isn't there.
        """
        values = {"run_id": run_id, "above": above_seq}
        with self._database.read() as conn, readable(conn):
            if conn.execute(_LACKS, values).first() is not None:
                raise CorruptError(f"requests are missing in the log of {run_id}; restore the database from a backup")
            return [whole_row(to_op(row)) for row in conn.execute(_REPLAYABLE, values)]

    def queue_position(self, op_id: OpId) -> tuple[int, int | None]:
        """(queued ops of its base that arrived before it, the first seq_id of its run that it still waits for).

        (0, None) for an op that isn't queued. No more than `COUNT_AHEAD` are counted: thousands may ask.
        """
        with self._database.read() as conn:
            place = _PLACE.first(conn, {"op_id": op_id})
            if place is None:
                return 0, None
            num, base_model, seq_id, state, head_seq = place
            if state != OpState.QUEUED:
                return 0, None
            (ahead,) = _AHEAD.first(conn, {"base": base_model, "num": num})
        is_early = head_seq is not None and head_seq < seq_id
        return int(ahead), head_seq + 1 if is_early else None

    def expire_results(self, finished_before: float, now: float, limit: int = 1000) -> int:
        """Forget results that are older; their ops answer GoneError from then on, and those that no recovery needs are
        dropped. Their files go to the graveyard, from which `checkpoints.collect` hands them out.

        Returns:
            How many; `limit` means that there may be more.
        """
        with self._database.read() as conn, readable(conn):
            if not conn.execute(_STALE, {"before": finished_before, "limit": 1}).all():
                return 0
        with self._database.write() as conn:
            with readable(conn):
                stale = conn.execute(_STALE, {"before": finished_before, "limit": limit}).all()
            conn.execute(_EXPIRE, {"nums": [row.num for row in stale if not row.is_spent]})
            conn.execute(_DROP, {"nums": [row.num for row in stale if row.is_spent]})
            bury(conn, [blob for row in stale for blob in (row.result_blob, row.routes_blob)], now)
        return len(stale)


def _found(op_id: OpId, row: Sequence[Any] | None) -> OpRow | GoneError:
    """What `_GET` came to. A row with a word that nothing knows is never carried out: it has failed."""
    if row is None or row[-1]:
        return GoneError("unknown or expired request id")
    op = to_op(row[:-1])
    if are_words_known(row):
        return op
    return replace_in(op, state=OpState.FAILED, failure=row_changed(op_id).as_failure(), result=None, result_blob=None)
