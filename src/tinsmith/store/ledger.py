"""The ledger: what was computed and stored for whom.

Tokens and checkpoints are counted by hour, run and kind, in the transaction that records the outcome: an outcome that
was recorded before counts for nothing, so a request is metered once however often it was computed. Storage is a span a
checkpoint: its size, from when, until when; `until` is its expiry while it lives, so nobody has to tick. Beside it go
the tallies of the day and the month, of the tenant and of the key that opened the session, for their quotas.

The functions work within the caller's transaction; `Ledger` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table, bindparam, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from tinsmith.store.database import Database
from tinsmith.store.prepared import Prepared
from tinsmith.store.quota_rules import day_of, month_of
from tinsmith.store.rows import NewCheckpoint
from tinsmith.store.schema import checkpoints, ops, runs, samplers, sessions, spans, tallies, tenants, usage
from tinsmith.store.usage_rows import StorageRow, StoredSpan, Usage, UsageKind, UsageRow
from tinsmith.types import OpId, TenantId

HOUR_S = 3600
NO_RUN = ""  # of a sampler over a plain base

_OF_OP = Prepared(
    select(
        ops.c.tenant_id, ops.c.base_model,
        func.coalesce(runs.c.session_id, samplers.c.session_id, "").label("session_id"),
        func.coalesce(ops.c.run_id, samplers.c.run_id, NO_RUN).label("run_id"),
        func.coalesce(ops.c.key_id, sessions.c.key_id),
    )
    .outerjoin(runs, runs.c.run_id == ops.c.run_id)
    .outerjoin(samplers, samplers.c.sampler_id == ops.c.sampler_id)
    .outerjoin(sessions, sessions.c.session_id == func.coalesce(runs.c.session_id, samplers.c.session_id))
    .where(ops.c.op_id == bindparam("id"))
)  # fmt: skip
_KEY = ("hour", "tenant_id", "session_id", "run_id", "base_model", "kind")
_TALLY_KEY = ("scope", "period", "kind")


def _adding(table: Table, key: Sequence[str]) -> Mapping[str, Prepared]:
    """By dialect: insert a row, or add to the quantity that is there."""
    to_sqlite, to_postgresql = sqlite.insert(table), postgresql.insert(table)
    return {
        "sqlite": Prepared(
            to_sqlite.on_conflict_do_update(
                index_elements=list(key), set_={"quantity": table.c.quantity + to_sqlite.excluded.quantity}
            )
        ),
        "postgresql": Prepared(
            to_postgresql.on_conflict_do_update(
                index_elements=list(key), set_={"quantity": table.c.quantity + to_postgresql.excluded.quantity}
            )
        ),
    }


_ADD = _adding(usage, _KEY)
_TALLY = _adding(tallies, _TALLY_KEY)
_OPEN_SPAN = insert(spans).inline()
_LIVE_SPAN = (
    (spans.c.run_id == bindparam("of_run"))
    & (spans.c.kind == bindparam("of_kind"))
    & (spans.c.name == bindparam("of_name"))
    & or_(spans.c.until.is_(None), spans.c.until > bindparam("now"))
)
_CLOSE_SPAN = update(spans).where(_LIVE_SPAN).values(until=bindparam("end"))
_IS_VISIBLE = or_(bindparam("of_tenant").is_(None), tenants.c.tenant_id == bindparam("of_tenant"))
_USAGE = (
    select(
        usage.c.hour, usage.c.tenant_id, tenants.c.name, usage.c.session_id, sessions.c.project_id,
        sessions.c.user_metadata, usage.c.run_id, usage.c.base_model, usage.c.kind, usage.c.quantity,
    )
    .join(tenants, tenants.c.tenant_id == usage.c.tenant_id)
    .outerjoin(sessions, sessions.c.session_id == usage.c.session_id)
    .where(usage.c.hour >= bindparam("start"), usage.c.hour < bindparam("end"), _IS_VISIBLE)
    .order_by(usage.c.hour, usage.c.quantity.desc(), usage.c.run_id, usage.c.kind)
    .limit(bindparam("limit"))
)  # fmt: skip
_SPANS = (
    select(
        spans.c.tenant_id, tenants.c.name, runs.c.session_id, sessions.c.project_id, sessions.c.user_metadata,
        spans.c.run_id, runs.c.base_model, spans.c.size_bytes, spans.c.since, spans.c.until,
    )
    .join(tenants, tenants.c.tenant_id == spans.c.tenant_id)
    .join(runs, runs.c.run_id == spans.c.run_id)
    .join(sessions, sessions.c.session_id == runs.c.session_id)
    .where(
        spans.c.since < bindparam("end"), or_(spans.c.until.is_(None), spans.c.until > bindparam("start")), _IS_VISIBLE
    )
    .order_by(spans.c.run_id, spans.c.since)
    .limit(bindparam("limit"))
)  # fmt: skip
_STORAGE = (
    select(
        checkpoints.c.tenant_id, tenants.c.name, sessions.c.project_id, func.count(),
        func.sum(checkpoints.c.size_bytes),
    )
    .join(tenants, tenants.c.tenant_id == checkpoints.c.tenant_id)
    .join(runs, runs.c.run_id == checkpoints.c.run_id)
    .join(sessions, sessions.c.session_id == runs.c.session_id)
    .where(
        or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > bindparam("now")),
        or_(bindparam("of_project").is_(None), sessions.c.project_id == bindparam("of_project")),
        _IS_VISIBLE,
    )
    .group_by(checkpoints.c.tenant_id, tenants.c.name, sessions.c.project_id)
    .order_by(tenants.c.name, sessions.c.project_id)
)  # fmt: skip


class Ledger:
    """`tenant_id` None: of all tenants, which is for administrators alone."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def usage(self, tenant_id: TenantId | None, start: int, end: int, limit: int) -> list[UsageRow]:
        """Tokens and checkpoints of the hours from `start` until before `end`, by hour, then the largest first."""
        values = {"of_tenant": tenant_id, "start": start, "end": end, "limit": limit}
        with self._database.read() as conn:
            return [_to_usage(row) for row in conn.execute(_USAGE, values)]

    def spans(self, tenant_id: TenantId | None, start: float, end: float, limit: int) -> list[StoredSpan]:
        """Checkpoints that were stored at some moment between the two."""
        values = {"of_tenant": tenant_id, "start": start, "end": end, "limit": limit}
        with self._database.read() as conn:
            rows: list[tuple[Any, ...]] = [tuple(row) for row in conn.execute(_SPANS, values)]
        return [StoredSpan(*row) for row in rows]

    def storage(self, tenant_id: TenantId | None, project_id: str | None, now: float) -> list[StorageRow]:
        """What live checkpoints take now, by tenant and project."""
        values = {"of_tenant": tenant_id, "of_project": project_id, "now": now}
        with self._database.read() as conn:
            return [StorageRow(*row) for row in conn.execute(_STORAGE, values)]


def meter(conn: Connection, used: Mapping[OpId, Usage], now: float) -> None:
    """Add what these ops took to the hour of `now`."""
    counted = {op_id: amounts for op_id, usage_ in used.items() if (amounts := usage_.amounts())}
    if not counted:
        return
    hour = int(now // HOUR_S) * HOUR_S
    periods = (day_of(now), month_of(now))
    sums: Counter[tuple[Any, ...]] = Counter()
    tallied: Counter[tuple[str, str, str]] = Counter()
    for op_id, amounts in counted.items():
        found = _OF_OP.first(conn, {"id": op_id})
        if found is None:
            continue
        tenant_id, base_model, session_id, run_id, key_id = found
        for kind, amount in amounts.items():
            sums[hour, tenant_id, session_id, run_id, base_model, kind.value] += amount
            for scope in (tenant_id, key_id) if key_id else (tenant_id,):
                for period in periods:
                    tallied[scope, period, kind.value] += amount
    if sums:
        _ADD[conn.dialect.name].run_many(conn, _rows(_KEY, sums))
        _TALLY[conn.dialect.name].run_many(conn, _rows(_TALLY_KEY, tallied))


def _rows(key: Sequence[str], sums: Mapping[tuple[Any, ...], int]) -> list[dict[str, Any]]:
    return [{**dict(zip(key, of, strict=True)), "quantity": amount} for of, amount in sums.items()]


def open_span(conn: Connection, tenant_id: TenantId, new: NewCheckpoint, now: float) -> None:
    """A checkpoint is stored from now until its expiry."""
    conn.execute(
        _OPEN_SPAN,
        {
            "tenant_id": tenant_id,
            "run_id": new.run_id,
            "kind": new.kind.value,
            "name": new.name,
            "size_bytes": new.size_bytes,
            "since": now,
            "until": new.expires_at,
        },
    )


def end_span(conn: Connection, named: Mapping[str, Any], until: float | None, now: float) -> None:
    """The checkpoint's storage ends at `until` (None: never). One that has ended already is left alone."""
    conn.execute(_CLOSE_SPAN, {**named, "end": until, "now": now})


def _to_usage(row: Any) -> UsageRow:
    (hour, tenant_id, tenant_name, session_id, project_id, metadata, run_id, base_model, kind, quantity) = row
    return UsageRow(
        hour=hour,
        tenant_id=tenant_id,
        tenant_name=tenant_name,
        session_id=session_id or None,
        project_id=project_id,
        user_metadata=metadata or {},
        run_id=run_id or None,
        base_model=base_model,
        kind=UsageKind(kind),
        quantity=quantity,
    )
