"""Where a waiting request stands in its queue, and how fast that moves: what clients are told while they wait.

Reads alone, and rough on purpose: the scheduler is fair between tenants, so the order of arrival is a bound and not the
order of service.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, func, literal_column, select

from tinsmith.store.database import Database
from tinsmith.store.fences import IS_QUEUED
from tinsmith.store.prepared import Prepared
from tinsmith.store.schema import FRESH_RESULT, ops, runs
from tinsmith.types import OpId, OpKind, OpState, TenantId

COUNT_AHEAD = 1000  # of the requests before one: thousands may ask
MAX_ENDED = 10_000  # looked at for the pace

_PLACE = Prepared(
    select(
        ops.c.num, ops.c.base_model, ops.c.seq_id, ops.c.state, ops.c.tenant_id,
        func.coalesce(ops.c.run_id, ops.c.sampler_id).label("own"), runs.c.head_seq,
    )
    .outerjoin(runs, runs.c.run_id == ops.c.run_id)
    .where(ops.c.op_id == bindparam("op_id"))
)  # fmt: skip
_QUEUED_BEFORE = (
    select(ops.c.tenant_id, func.coalesce(ops.c.run_id, ops.c.sampler_id).label("own"))
    .where(
        ops.c.base_model == bindparam("base"),
        ops.c.kind.in_([literal_column(f"'{kind}'") for kind in OpKind]),  # for the queue's index
        ops.c.num < bindparam("num"),
        IS_QUEUED,
    )
    .limit(literal_column(str(COUNT_AHEAD)))
    .subquery()
)
_AHEAD = Prepared(
    select(
        _QUEUED_BEFORE.c.tenant_id,
        func.count().label("num"),
        func.coalesce(func.sum(_QUEUED_BEFORE.c.own == bindparam("own")), 0).label("num_own"),
    ).group_by(_QUEUED_BEFORE.c.tenant_id)
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
class Ahead:
    """Queued requests of the same base that arrived before one: by tenant, and those of its own run or sampler.

    missing: the first seq_id of its run that has not arrived, if it waits for that. No more than `COUNT_AHEAD` are
    counted.
    """

    by_tenant: dict[TenantId, int]
    num_own: int
    missing: int | None = None

    @property
    def is_more(self) -> bool:
        """There may be more than are counted."""
        return sum(self.by_tenant.values()) >= COUNT_AHEAD


class Places:
    def __init__(self, database: Database) -> None:
        self._database = database

    def ahead(self, op_id: OpId) -> Ahead | None:
        """None: it isn't queued."""
        with self._database.read() as conn:
            place = _PLACE.first(conn, {"op_id": op_id})
            if place is None or place[3] != OpState.QUEUED:
                return None
            num, base, seq_id, _, _, own, head_seq = place
            rows = _AHEAD.all(conn, {"base": base, "num": num, "own": own})
        is_early = head_seq is not None and head_seq < seq_id
        return Ahead(
            {tenant_id: count for tenant_id, count, _ in rows},
            sum(num_own for _, _, num_own in rows),
            head_seq + 1 if is_early else None,
        )

    def ended_since(self, since: float) -> dict[tuple[str, TenantId], int]:
        """How many requests have ended since then (unix seconds), by base and tenant; some `MAX_ENDED` at most."""
        with self._database.read() as conn:
            return {(base, tenant_id): count for base, tenant_id, count in _PACE.all(conn, {"since": since})}
