"""Who waits in the queue of a base, in the order of arrival, and how fast that moves: what clients are told.

Reads alone, and rough on purpose: the scheduler is fair between tenants, so the order of arrival is a bound and not the
order of service.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, func, select

from tinsmith.store.database import Database
from tinsmith.store.fences import IS_QUEUED, IS_RUNNING
from tinsmith.store.prepared import Prepared
from tinsmith.store.schema import FRESH_RESULT, ops, runs
from tinsmith.types import OpId, OpState, TenantId

MAX_ENDED = 10_000  # looked at for the pace

_PLACE = Prepared(
    select(ops.c.num, ops.c.seq_id, ops.c.state, runs.c.head_seq)
    .outerjoin(runs, runs.c.run_id == ops.c.run_id)
    .where(ops.c.op_id == bindparam("op_id"))
)
_QUEUE = Prepared(
    select(
        ops.c.num,
        ops.c.tenant_id,
        func.coalesce(ops.c.run_id, ops.c.sampler_id),
        ops.c.op_id,
        ops.c.seq_id,
        runs.c.head_seq,
    )
    .outerjoin(runs, runs.c.run_id == ops.c.run_id)
    .where(ops.c.base_model == bindparam("base"), IS_QUEUED)
    .order_by(ops.c.num)
)
_RUNNING = Prepared(
    select(ops.c.run_id, ops.c.sampler_id, func.count())
    .where(IS_RUNNING, ops.c.base_model == bindparam("base"))
    .group_by(ops.c.run_id, ops.c.sampler_id)
)
_ENDED = (
    select(ops.c.base_model, ops.c.tenant_id)
    .where(FRESH_RESULT, ops.c.finished_at > bindparam("since"))
    .limit(MAX_ENDED)
    .subquery()
)
_PACE = Prepared(
    select(_ENDED.c.base_model, _ENDED.c.tenant_id, func.count()).group_by(_ENDED.c.base_model, _ENDED.c.tenant_id)
)


@dataclass(frozen=True, slots=True)
class Place:
    """num: of a queued request, by its arrival. missing: the first seq_id of its run that has not arrived, if it waits
    for that."""

    num: int
    missing: int | None = None


class Places:
    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, op_id: OpId) -> Place | None:
        """None: it isn't queued."""
        with self._database.read() as conn:
            row = _PLACE.first(conn, {"op_id": op_id})
        if row is None or row[2] != OpState.QUEUED:
            return None
        num, seq_id, _, head_seq = row
        return Place(num, _missing(seq_id, head_seq))

    def queue(self, base_model: str) -> list[tuple[OpId, Place, TenantId, str]]:
        """(id, place, tenant, run or sampler) of all that is queued for a base, by arrival."""
        with self._database.read() as conn:
            rows = _QUEUE.all(conn, {"base": base_model})
        return [
            (op_id, Place(num, _missing(seq_id, head_seq)), tenant_id, own)
            for num, tenant_id, own, op_id, seq_id, head_seq in rows
        ]

    def running(self, base_model: str) -> dict[str, int]:
        """How many requests of each run or sampler of a base are computed now."""
        with self._database.read() as conn:
            rows = _RUNNING.all(conn, {"base": base_model})
        return {run_id or sampler_id: count for run_id, sampler_id, count in rows}

    def ended_since(self, since: float) -> dict[tuple[str, TenantId], int]:
        """How many requests have ended since then (unix seconds), by base and tenant; some `MAX_ENDED` at most."""
        with self._database.read() as conn:
            return {(base, tenant_id): count for base, tenant_id, count in _PACE.all(conn, {"since": since})}


def _missing(seq_id: int, head_seq: int | None) -> int | None:
    return head_seq + 1 if head_seq is not None and head_seq < seq_id else None
