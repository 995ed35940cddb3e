"""Looking for sessions: filters that all hold, newest first, page by page from a cursor.

Reads alone. A page's cursor is its last session; it stays right while sessions come and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, bindparam, false, func, or_, select, true

from tinsmith.errors import UserError
from tinsmith.store.database import Database, fold
from tinsmith.store.rows import SessionRow
from tinsmith.store.schema import checkpoints, runs, sessions
from tinsmith.store.sessions import COLUMNS, to_session
from tinsmith.types import SessionId, TenantId

NO_PROJECT = ""  # the project of a session that is in none
UNQUOTABLE = set('"\\\0')  # what no path into JSON can hold

_CURSOR = select(sessions.c.created_at).where(
    sessions.c.session_id == bindparam("session_id"), sessions.c.tenant_id == bindparam("tenant_id")
)
_COUNTS = (
    select(runs.c.session_id, func.count(), func.sum(checkpoints.c.size_bytes))
    .join(runs, runs.c.run_id == checkpoints.c.run_id)
    .where(
        runs.c.session_id.in_(bindparam("session_ids", expanding=True)),
        or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > bindparam("now")),
    )
    .group_by(runs.c.session_id)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFilter:
    """None: any. A session matches `session_id` or `name` where both are given. `reasons`: of finished sessions;
    `is_active` True takes those that haven't ended; with either, one of the two has to hold."""

    session_id: str | None = None
    name: str | None = None
    project_ids: Sequence[str] | None = None
    user_metadata: dict[str, str]
    is_active: bool | None = None
    reasons: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class FoundSession:
    row: SessionRow
    num_checkpoints: int
    checkpoint_bytes: int


class SessionSearch:
    def __init__(self, database: Database) -> None:
        self._database = database

    def page(
        self, tenant_id: TenantId, wanted: SessionFilter, after: tuple[float, SessionId] | None, limit: int, now: float
    ) -> list[FoundSession]:
        """At most `limit` sessions of the tenant, newest first, those after the cursor (when made, id) alone.

        Raises:
            UserError: a metadata key that can't be looked for, or a blank name.
        """
        query = select(*COLUMNS).where(sessions.c.tenant_id == tenant_id, *_conditions(wanted))
        query = query.order_by(sessions.c.created_at.desc(), sessions.c.session_id.desc()).limit(limit)
        with self._database.read() as conn:
            if after is not None:
                made, session_id = after
                stored = conn.execute(_CURSOR, {"session_id": session_id, "tenant_id": tenant_id}).scalar()
                query = _after(query, made if stored is None else stored, session_id)
            rows = [to_session(row) for row in conn.execute(query)]
            found = conn.execute(_COUNTS, {"session_ids": [row.session_id for row in rows], "now": now})
            counts: dict[Any, tuple[int, int]] = {row[0]: (row[1], row[2]) for row in found}
        return [FoundSession(row, *counts.get(row.session_id, (0, 0))) for row in rows]


def _after(query: Select[Any], made: float, session_id: str) -> Select[Any]:
    return query.where(
        or_(
            sessions.c.created_at < made,
            and_(sessions.c.created_at == made, sessions.c.session_id < session_id),
        )
    )


def _conditions(wanted: SessionFilter) -> list[ColumnElement[bool]]:
    conditions = [_is_named(wanted), _is_in_state(wanted)]
    if wanted.project_ids is not None:
        conditions.append(func.coalesce(sessions.c.project_id, NO_PROJECT).in_(wanted.project_ids))
    for key, value in wanted.user_metadata.items():
        if UNQUOTABLE & set(key):
            raise UserError(f"user_metadata keys with quotes, backslashes or NUL can't be looked for: {key[:100]!r}")
        conditions.append(sessions.c.user_metadata[key].as_string() == value)
    return conditions


def _is_named(wanted: SessionFilter) -> ColumnElement[bool]:
    either: list[ColumnElement[bool]] = []
    if wanted.session_id is not None:
        either.append(sessions.c.session_id == wanted.session_id)
    if wanted.name is not None:
        words = wanted.name.split()
        if not words:
            raise UserError("display_name is blank: give a word that the name holds, or leave it out")
        name = func.fold(sessions.c.display_name)
        either.append(and_(*(func.instr(name, fold(word)) > 0 for word in words)))
    return or_(*either) if either else true()


def _is_in_state(wanted: SessionFilter) -> ColumnElement[bool]:
    if wanted.is_active is None and wanted.reasons is None:
        return true()
    is_active = sessions.c.finished_at.is_(None) if wanted.is_active else false()
    return or_(is_active, sessions.c.finish_reason.in_(wanted.reasons or ()))
