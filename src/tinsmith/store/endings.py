"""The ends of a sampler's requests: numbered in the order in which they are committed, and brought about by cancelling.

What stays true: the sampler's row is locked by the count, so whoever has read up to number n misses nothing at or below
n. A request's number never changes, and outlives its result. A cancelled request has its `owner` until what that worker
computed for it is metered, in the same transaction: so it is metered once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count

from sqlalchemy import Connection, bindparam, literal_column, select, update

from tinsmith.errors import GoneError, UnsupportedError
from tinsmith.observe.series import OPS
from tinsmith.store.database import Database
from tinsmith.store.end_rows import Ended, EndsAfter
from tinsmith.store.fences import IS_QUEUED, IS_RUNNING, require_current
from tinsmith.store.graveyard import bury
from tinsmith.store.ledger import meter
from tinsmith.store.op_rows import LIGHT, WHOLE, to_op
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import OpRow, WorkerId
from tinsmith.store.schema import ops, samplers
from tinsmith.store.usage_rows import Usage
from tinsmith.types import Failure, OpId, OpKind, OpState, SamplerId, SessionId, TenantId

PAGE = 1000  # sessions in one statement

_COUNT_UP = Prepared(
    update(samplers)
    .where(samplers.c.sampler_id == bindparam("id"))
    .values(num_ended=samplers.c.num_ended + bindparam("more"))
    .returning(samplers.c.num_ended)
)
_NUMBER = Prepared(update(ops).where(ops.c.op_id == bindparam("id")).values(ended_num=bindparam("number")))
_OPEN = (
    select(*WHOLE, ops.c.is_expired)
    .where(ops.c.op_id == bindparam("op_id"), ops.c.tenant_id == bindparam("tenant_id"))
    .with_for_update()
)
_CANCEL = (
    update(ops)
    .where(ops.c.op_id == bindparam("id"))
    .values(state=OpState.CANCELLED.value, finished_at=bindparam("now"), payload=None, payload_blob=None)
)
_GIVE_UP = (
    update(ops)
    .where(ops.c.op_id == bindparam("id"), ops.c.state.in_([OpState.QUEUED.value, OpState.RUNNING.value]))
    .values(
        state=OpState.CANCELLED.value, finished_at=bindparam("now"), payload=None, payload_blob=None,
        failure_code=bindparam("code"), failure_category=bindparam("category"), failure_message=bindparam("message"),
    )
    .returning(ops.c.op_id)
)  # fmt: skip
_OLD_SAMPLES = [
    select(*LIGHT).where(ops.c.kind == "sample", is_state, ops.c.created_at < bindparam("before"))
    for is_state in (IS_QUEUED, IS_RUNNING)
]
_OPEN_OF_SESSIONS = (
    select(ops.c.op_id, ops.c.sampler_id, ops.c.base_model, ops.c.payload_blob)
    .join(samplers, samplers.c.sampler_id == ops.c.sampler_id)
    .where(
        samplers.c.session_id.in_(bindparam("session_ids", expanding=True)),
        ops.c.state.in_([OpState.QUEUED.value, OpState.RUNNING.value]),
    )
    .order_by(ops.c.num)
    .with_for_update(of=ops)
)
_LET_GO = (
    update(ops)
    .where(
        ops.c.op_id.in_(bindparam("op_ids", expanding=True)),
        ops.c.state == OpState.CANCELLED.value,
        ops.c.owner == bindparam("slot"),
    )
    .values(owner=None)
    .returning(ops.c.op_id)
)
_NUM_ENDED = select(samplers.c.sampler_id, samplers.c.num_ended).where(
    samplers.c.sampler_id.in_(bindparam("sampler_ids", expanding=True))
)
_ENDED = (
    select(ops.c.ended_num, ops.c.op_id, ops.c.state, ops.c.result_bytes)
    .where(
        ops.c.sampler_id == bindparam("sampler_id"),
        ops.c.ended_num > bindparam("after"),
        ops.c.seq_id >= bindparam("first_seq"),
        ops.c.seq_id < bindparam("end_seq"),
    )
    .order_by(ops.c.ended_num)
    .limit(bindparam("limit"))
)


_WAITING = (
    select(*LIGHT)
    .join(samplers, samplers.c.sampler_id == ops.c.sampler_id)
    .where(
        ops.c.base_model == samplers.c.base_model,
        ops.c.kind == literal_column(f"'{OpKind.SAMPLE}'"),
        IS_QUEUED,
        samplers.c.sampler_id == bindparam("sampler_id"),
        ops.c.seq_id >= bindparam("first_seq"),
        ops.c.seq_id < bindparam("end_seq"),
    )
    .order_by(ops.c.num)
    .limit(bindparam("limit"))
)


class Endings:
    def __init__(self, database: Database) -> None:
        self._database = database

    def cancel(self, tenant_id: TenantId, op_id: OpId, now: float) -> OpRow:
        """QUEUED or RUNNING ▸ CANCELLED; what its worker still makes of it is dropped. After its end nothing changes.

        Returns:
            The request as it was.

        Raises:
            GoneError: no such op of this tenant, or its result has expired.
            UnsupportedError: it is no sample.
        """
        with self._database.write() as conn:
            row = conn.execute(_OPEN, {"op_id": op_id, "tenant_id": tenant_id}).first()
            if row is None or row.is_expired:
                raise GoneError("unknown or expired request id")
            op = to_op(row[:-1])
            if op.kind is not OpKind.SAMPLE or op.sampler_id is None:
                raise UnsupportedError(f"only sample requests can be cancelled, and this is {op.kind}: let it end")
            if op.state.is_final:
                return op
            conn.execute(_CANCEL, {"id": op_id, "now": now})
            bury(conn, [op.payload_blob], now)
            number_ends(conn, [(op.sampler_id, op_id)])
        OPS.add(OpKind.SAMPLE, OpState.CANCELLED)
        return op

    def open_since(self, before: float) -> list[OpRow]:
        """Samples of all tenants that wait or run, and arrived before that time (unix seconds); without payloads."""
        with self._database.read() as conn:
            return [to_op(row) for query in _OLD_SAMPLES for row in conn.execute(query, {"before": before})]

    def give_up(self, samples: Sequence[OpRow], failure: Failure, now: float) -> list[OpId]:
        """QUEUED or RUNNING ▸ CANCELLED, by the server and for the reason given; those that had not ended meanwhile."""
        given_up: list[OpId] = []
        values = {"now": now, "code": failure.code, "category": failure.category, "message": failure.message}
        with self._database.write() as conn:
            for op in samples:
                if conn.execute(_GIVE_UP, {"id": op.id, **values}).first() is not None and op.sampler_id is not None:
                    given_up.append(op.id)
                    bury(conn, [op.payload_blob], now)
                    number_ends(conn, [(op.sampler_id, op.id)])
        OPS.add(OpKind.SAMPLE, OpState.CANCELLED, by=len(given_up))
        return given_up

    def meter(self, worker: WorkerId, used: Mapping[OpId, Usage], now: float) -> None:
        """What a worker has computed for requests that were cancelled meanwhile, and lets go of now.

        Raises:
            FencedError: the worker's place was taken.
        """
        with self._database.write() as conn:
            require_current(conn, worker)
            meter_cancelled(conn, worker, used, now)

    def after(
        self, sampler_id: SamplerId, after: int, first_seq: int, end_seq: int, limit: int
    ) -> tuple[list[Ended], int]:
        """(ends above number `after` of requests with a seq_id in first_seq..end_seq-1, the sampler's last number)."""
        values = {"sampler_id": sampler_id, "after": after, "first_seq": first_seq, "end_seq": end_seq, "limit": limit}
        with self._database.read() as conn:
            last = conn.execute(_NUM_ENDED, {"sampler_ids": [sampler_id]}).first()
            ended = [
                Ended(row.ended_num, row.op_id, OpState(row.state), row.result_bytes)
                for row in conn.execute(_ENDED, values)
            ]
        return ended, 0 if last is None else last.num_ended

    def waiting(self, sampler_id: SamplerId, first_seq: int, end_seq: int, limit: int) -> list[OpRow]:
        """The oldest queued requests of the sampler with a seq_id in first_seq..end_seq-1, without their payloads."""
        values = {"sampler_id": sampler_id, "first_seq": first_seq, "end_seq": end_seq, "limit": limit}
        with self._database.read() as conn:
            return [to_op(row) for row in conn.execute(_WAITING, values)]

    def reached(self, marks: Collection[EndsAfter]) -> set[EndsAfter]:
        """Those of `marks` beyond which something has ended."""
        if not marks:
            return set()
        with self._database.read() as conn:
            rows = conn.execute(_NUM_ENDED, {"sampler_ids": sorted({mark.sampler_id for mark in marks})})
            last = {row.sampler_id: row.num_ended for row in rows}
        return {mark for mark in marks if last.get(mark.sampler_id, 0) > mark.num}


def cancel_samples(conn: Connection, session_ids: Sequence[SessionId], now: float) -> set[str]:
    """Cancel what waits or runs for the samplers of these sessions, in the caller's transaction.

    Returns:
        The base models that are concerned.
    """
    pages = [session_ids[at : at + PAGE] for at in range(0, len(session_ids), PAGE)]
    rows = [row for page in pages for row in conn.execute(_OPEN_OF_SESSIONS, {"session_ids": list(page)})]
    if rows:
        conn.execute(_CANCEL, [{"id": row.op_id, "now": now} for row in rows])
        bury(conn, [row.payload_blob for row in rows], now)
        number_ends(conn, [(row.sampler_id, row.op_id) for row in rows])
        OPS.add(OpKind.SAMPLE, OpState.CANCELLED, by=len(rows))
    return {row.base_model for row in rows}


def meter_cancelled(conn: Connection, worker: WorkerId, used: Mapping[OpId, Usage], now: float) -> None:
    """Meter what a worker computed for requests cancelled under it: once each, in the caller's transaction."""
    if used:
        values = {"op_ids": list(used), "slot": worker.slot}
        let_go = conn.execute(_LET_GO, values).scalars().all()
        meter(conn, {op_id: used[op_id] for op_id in let_go}, now)


def number_ends(conn: Connection, ended: Iterable[tuple[SamplerId, OpId]]) -> None:
    """Number requests that end in the caller's transaction, in the order given."""
    by_sampler: dict[SamplerId, list[OpId]] = defaultdict(list)
    for sampler_id, op_id in ended:
        by_sampler[sampler_id].append(op_id)
    for sampler_id, op_ids in sorted(by_sampler.items()):
        counted = _COUNT_UP.first(conn, {"id": sampler_id, "more": len(op_ids)})
        if counted is None:  # its name, in either row, was changed on the disk
            continue
        (last,) = counted
        numbers = zip(op_ids, count(last - len(op_ids) + 1), strict=False)
        _NUMBER.run_many(conn, [{"id": op_id, "number": number} for op_id, number in numbers])
