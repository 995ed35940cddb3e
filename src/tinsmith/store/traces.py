"""What a session's requests went through: when they came, when they were computed, and beside how many others.

Reads alone, from the rows of the queue. Ops that were claimed by one worker at one moment were computed together; of
those of other sessions only their number is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import and_, bindparam, case, func, or_, select

from tinsmith.store.database import Database
from tinsmith.store.schema import ops
from tinsmith.store.usage_rows import SharedStep, TracedOp
from tinsmith.types import OpKind, OpState, SessionId, TenantId

PASS = "pass"
CHUNK = 500

_COLUMNS = (
    ops.c.op_id, ops.c.kind, ops.c.base_model, func.coalesce(ops.c.run_id, ops.c.sampler_id), ops.c.seq_id,
    ops.c.state, ops.c.cost_tokens, ops.c.attempts, ops.c.owner, ops.c.created_at, ops.c.started_at,
    ops.c.finished_at, ops.c.failure_code,
)  # fmt: skip
_OF_SESSION = (
    select(*_COLUMNS)
    .where(
        ops.c.tenant_id == bindparam("tenant_id"),
        or_(
            and_(ops.c.run_id >= bindparam("first"), ops.c.run_id < bindparam("beyond")),
            and_(ops.c.sampler_id >= bindparam("first"), ops.c.sampler_id < bindparam("beyond")),
        ),
    )
    .order_by(ops.c.num.desc())
    .limit(bindparam("limit"))
)
_STEP = case((ops.c.kind.in_([kind.value for kind in OpKind if kind.is_pass]), PASS), else_=ops.c.kind)
_SHARED = (
    select(
        ops.c.owner, ops.c.started_at, _STEP, func.count(), func.count(ops.c.run_id.distinct()),
        func.sum(ops.c.cost_tokens),
    )
    .where(ops.c.started_at.in_(bindparam("moments", expanding=True)), ops.c.run_id.is_not(None))
    .group_by(ops.c.owner, ops.c.started_at, _STEP)
)  # fmt: skip


class Traces:
    def __init__(self, database: Database) -> None:
        self._database = database

    def ops(self, tenant_id: TenantId, session_id: SessionId, limit: int) -> list[TracedOp]:
        """The session's requests in order of arrival; the newest `limit` if there are more. Of a session that isn't
        the tenant's there are none."""
        prefix = f"{session_id}:"
        values = {"tenant_id": tenant_id, "first": prefix, "beyond": prefix[:-1] + ";", "limit": limit}
        with self._database.read() as conn:
            rows = conn.execute(_OF_SESSION, values).all()
        return [_to_traced(row) for row in reversed(rows)]

    def shared(self, traced: Sequence[TracedOp]) -> dict[tuple[str, float, str], SharedStep]:
        """How many ops, of whomever, were computed together with each of these; by (worker, moment, step)."""
        moments = sorted({op.started_at for op in traced if op.started_at is not None and op.kind is not OpKind.SAMPLE})
        found: dict[tuple[str, float, str], SharedStep] = {}
        for i in range(0, len(moments), CHUNK):
            with self._database.read() as conn:
                for owner, moment, step, *counts in conn.execute(_SHARED, {"moments": moments[i : i + CHUNK]}):
                    found[owner, moment, step] = SharedStep(*counts)
        return found


def _to_traced(row: Sequence[Any]) -> TracedOp:
    op_id, kind, base_model, place, seq_id, state, *rest = row
    return TracedOp(op_id, OpKind(kind), base_model, place, seq_id, OpState(state), *rest)
