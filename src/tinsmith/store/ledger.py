"""The ledger: what was computed and stored for whom.

Tokens and checkpoints are counted by hour, run and kind, in the transaction that records the outcome: an outcome that
was recorded before counts for nothing, so a request is metered once however often it was computed. Storage is a span a
checkpoint: its size, from when, until when; `until` is its expiry while it lives, so nobody has to tick. Beside it go
the tallies of the day and the month, of the tenant and of the key that opened the session, for their quotas.

Hours that are long gone may be moved into days, which takes nothing from any sum over whole days.

The functions work within the caller's transaction; `Ledger` reads, and moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    Connection,
    Select,
    Table,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from tinsmith.crashpoints import crash_point
from tinsmith.errors import UserError
from tinsmith.store.database import Database
from tinsmith.store.prepared import Prepared
from tinsmith.store.quota_rules import day_of, month_of
from tinsmith.store.rows import NewCheckpoint
from tinsmith.store.schema import checkpoints, ops, runs, samplers, sessions, spans, tallies, tenants, usage, usage_days
from tinsmith.store.usage_rows import StorageRow, StoredSpan, Usage, UsageKind, UsageRow
from tinsmith.types import OpId, TenantId

HOUR_S = 3600
DAY_S = 24 * HOUR_S
MOVED_AT_ONCE = 1000  # rows of one transaction
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
_DAY_KEY = ("day", *_KEY[1:])
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
_ADD_DAY = _adding(usage_days, _DAY_KEY)
_OLD = (
    select(*(usage.c[name] for name in _KEY), usage.c.quantity)
    .where(usage.c.hour < bindparam("before"))
    .order_by(usage.c.hour)
    .limit(bindparam("limit"))
)
_MOVED = Prepared(delete(usage).where(*(usage.c[name] == bindparam(f"of_{name}") for name in _KEY)))
_OPEN_SPAN = insert(spans).inline()
_LIVE_SPAN = (
    (spans.c.run_id == bindparam("of_run"))
    & (spans.c.kind == bindparam("of_kind"))
    & (spans.c.name == bindparam("of_name"))
    & or_(spans.c.until.is_(None), spans.c.until > bindparam("now"))
)
_CLOSE_SPAN = update(spans).where(_LIVE_SPAN).values(until=bindparam("end"))
_IS_VISIBLE = or_(bindparam("of_tenant").is_(None), tenants.c.tenant_id == bindparam("of_tenant"))


def _used(table: Table, begun: str, seconds: int) -> Select[Any]:
    return (
        select(
            table.c[begun], literal_column(str(seconds)), table.c.tenant_id, tenants.c.name, table.c.session_id,
            sessions.c.project_id, sessions.c.user_metadata, table.c.run_id, table.c.base_model, table.c.kind,
            table.c.quantity,
        )
        .join(tenants, tenants.c.tenant_id == table.c.tenant_id)
        .outerjoin(sessions, sessions.c.session_id == table.c.session_id)
        .where(table.c[begun] >= bindparam("start"), table.c[begun] < bindparam("end"), _IS_VISIBLE)
        .order_by(table.c[begun], table.c.quantity.desc(), table.c.run_id, table.c.kind)
        .limit(bindparam("limit"))
    )  # fmt: skip


_USAGE = (_used(usage_days, "day", DAY_S), _used(usage, "hour", HOUR_S))
_IS_CUT = (
    select(usage_days.c.day)
    .join(tenants, tenants.c.tenant_id == usage_days.c.tenant_id)
    .where(
        _IS_VISIBLE,
        or_(
            and_(usage_days.c.day < bindparam("start"), usage_days.c.day > bindparam("start") - DAY_S),
            and_(usage_days.c.day < bindparam("end"), usage_days.c.day > bindparam("end") - DAY_S),
        ),
    )
    .order_by(usage_days.c.day)
    .limit(1)
)
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
        """Tokens and checkpoints of the hours from `start` until before `end`, by hour, then the largest first.

        Raises:
            UserError: one of the two lies within a day of which the hours aren't kept any more.
        """
        values = {"of_tenant": tenant_id, "start": start, "end": end, "limit": limit}
        with self._database.read() as conn:
            cut = conn.execute(_IS_CUT, values).scalar()
            if cut is not None:
                raise UserError(
                    f"usage of {day_of(cut)} is kept by the day: let the window begin and end at midnight UTC"
                )
            return [_to_usage(row) for query in _USAGE for row in conn.execute(query, values)][:limit]

    def move_old(self, before: float, limit: int = MOVED_AT_ONCE) -> int:
        """Move rows of whole days that had ended by `before` (unix seconds) into days; how many rows of hours. `limit`:
        there may be more."""
        values = {"before": int(before // DAY_S) * DAY_S, "limit": limit}
        with self._database.read() as conn:
            if conn.execute(_OLD, {**values, "limit": 1}).first() is None:
                return 0
        with self._database.write() as conn:
            rows = conn.execute(_OLD, values).all()
            sums: Counter[tuple[Any, ...]] = Counter()
            for row in rows:
                sums[row.hour // DAY_S * DAY_S, *row[1:-1]] += row.quantity
            _ADD_DAY[conn.dialect.name].run_many(conn, _rows(_DAY_KEY, sums))
            _MOVED.run_many(conn, [{f"of_{name}": row._mapping[name] for name in _KEY} for row in rows])
            crash_point("usage.before_move_commit")
        return len(rows)

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
    (hour, seconds, tenant_id, tenant_name, session_id, project_id, metadata, run_id, base_model, kind, quantity) = row
    return UsageRow(
        hour=hour,
        seconds=seconds,
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
