"""Sessions: one client process each, alive as long as it sends heartbeats.

Owns how a session begins and ends; the first end wins, and cancels the samples that still wait or run. Its runs and
samplers outlive it as rows, and training that was acknowledged is carried out. One that nothing refers to is dropped
`EMPTY_S` after its end. How many a tenant may have is judged here (session_bounds.py), where they are made.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import JSON, Connection, bindparam, delete, exists, func, insert, or_, select, update

from tinsmith.errors import ForbiddenError, GoneError, NotFoundError
from tinsmith.scopes import Scope
from tinsmith.store.audit import note
from tinsmith.store.database import Database
from tinsmith.store.endings import cancel_samples
from tinsmith.store.prepared import Prepared, readable
from tinsmith.store.rows import Principal, SessionRow
from tinsmith.store.schema import custom_losses, keys, runs, samplers, sessions, usage, usage_days
from tinsmith.store.session_bounds import require_room
from tinsmith.types import RunId, RunStatus, SamplerId, SessionId, TenantId

EMPTY_S = 3600.0  # a session that has ended is known for so long, though nothing of it is left
EXPIRED = "expired"  # finish_reason of a session whose heartbeats stopped

SessionRows: TypeAlias = list[SessionRow]  # within the class, `list` is a method

COLUMNS = (
    sessions.c.session_id, sessions.c.tenant_id, sessions.c.tags, sessions.c.user_metadata, sessions.c.sdk_version,
    sessions.c.project_id, sessions.c.display_name, sessions.c.created_at, sessions.c.last_beat_at,
    sessions.c.finished_at, sessions.c.finish_reason, sessions.c.finish_detail,
)  # fmt: skip
_IS_TENANTS = sessions.c.tenant_id == bindparam("tenant_id")
_GET = select(*COLUMNS).where(sessions.c.session_id == bindparam("session_id"), _IS_TENANTS)
_INSERT = insert(sessions).inline()
_BEAT = (
    update(sessions)
    .where(
        sessions.c.session_id == bindparam("id"),
        sessions.c.tenant_id == bindparam("of_tenant"),
        sessions.c.finished_at.is_(None),
    )
    .values(last_beat_at=bindparam("now"))
)
_FINISH = (
    update(sessions)
    .where(
        sessions.c.session_id == bindparam("id"),
        sessions.c.tenant_id == bindparam("of_tenant"),
        sessions.c.finished_at.is_(None),
    )
    .values(finished_at=bindparam("now"), finish_reason=bindparam("reason"), finish_detail=bindparam("detail"))
)
_OPENER = select(sessions.c.key_id).where(sessions.c.session_id == bindparam("session_id"), _IS_TENANTS)
_SUCCESSOR = select(keys.c.successor_id).where(keys.c.key_id == bindparam("key_id"))
_SET_PROJECT = update(sessions).where(sessions.c.session_id == bindparam("id")).values(project_id=bindparam("project"))
_SILENT = select(sessions.c.session_id).where(
    sessions.c.finished_at.is_(None), sessions.c.last_beat_at < bindparam("before")
)
_EXPIRE = (
    update(sessions)
    .where(sessions.c.finished_at.is_(None), sessions.c.last_beat_at < bindparam("before"))
    .values(finished_at=bindparam("now"), finish_reason=EXPIRED)
    .returning(sessions.c.session_id)
)
_EMPTY = (
    select(sessions.c.session_id)
    .where(
        sessions.c.finished_at < bindparam("before"),
        sessions.c.created_at < bindparam("before"),
        *(
            ~exists().where(table.c.session_id == sessions.c.session_id)
            for table in (runs, samplers, custom_losses, usage, usage_days)
        ),
    )
    .limit(bindparam("limit"))
)
_DROP = delete(sessions).where(sessions.c.session_id.in_(bindparam("session_ids", expanding=True)))
_LIST = (
    select(*COLUMNS)
    .where(_IS_TENANTS)
    .order_by(sessions.c.created_at.desc(), sessions.c.session_id.desc())
    .limit(bindparam("limit"))
    .offset(bindparam("offset"))
)
_COUNT = select(func.count()).select_from(sessions).where(_IS_TENANTS)
_RUNS = (
    select(runs.c.run_id)
    .where(runs.c.session_id == bindparam("session_id"), runs.c.status != RunStatus.GONE.value)
    .order_by(runs.c.model_seq_id)
)
_SAMPLERS = (
    select(samplers.c.sampler_id)
    .where(samplers.c.session_id == bindparam("session_id"))
    .order_by(samplers.c.created_at, samplers.c.sampler_id)
)


_ENDED_AMONG = Prepared(
    select(runs.c.run_id)
    .join(sessions, sessions.c.session_id == runs.c.session_id)
    .where(
        runs.c.run_id.in_(select(func.json_each(bindparam("run_ids", type_=JSON)).table_valued("value").c.value)),
        or_(sessions.c.finished_at.is_not(None), runs.c.gone_at.is_not(None)),
    )
)


class Sessions:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant_id: TenantId,
        *,
        tags: Sequence[str] = (),
        user_metadata: Mapping[str, Any] | None = None,
        sdk_version: str | None = None,
        project_id: str | None = None,
        display_name: str | None = None,
        now: float | None = None,
        by: Principal | None = None,
        most: int | None = None,
    ) -> SessionRow:
        """A new session, whose first heartbeat is its creation (`now`, default: the clock).

        Args:
            by: whose key opens it.
            most: how many of the tenant's may live at one time; None: there's no bound.

        Raises:
            CapacityError: as many live already, or too many were opened lately.
        """
        created_at = time.time() if now is None else now
        row = SessionRow(
            session_id=SessionId("s" + secrets.token_hex(12)),
            tenant_id=tenant_id,
            tags=tuple(tags),
            user_metadata=dict(user_metadata or {}),
            sdk_version=sdk_version,
            project_id=project_id,
            display_name=display_name,
            created_at=created_at,
            last_beat_at=created_at,
            finished_at=None,
            finish_reason=None,
            finish_detail=None,
        )
        with self._database.write() as conn:
            if most is not None:
                require_room(conn, tenant_id, by, most, created_at)
            conn.execute(
                _INSERT,
                {
                    "session_id": row.session_id,
                    "tenant_id": tenant_id,
                    "tags": row.tags,
                    "user_metadata": row.user_metadata,
                    "sdk_version": sdk_version,
                    "project_id": project_id,
                    "display_name": display_name,
                    "created_at": created_at,
                    "last_beat_at": created_at,
                    "key_id": None if by is None else by.key_id,
                },
            )
        return row

    def get(self, tenant_id: TenantId, session_id: SessionId) -> SessionRow:
        """Raises: NotFoundError: no such session of this tenant."""
        with self._database.read() as conn:
            return _get(conn, tenant_id, session_id)

    def beat(self, tenant_id: TenantId, session_id: SessionId, now: float, *, by: Principal | None = None) -> None:
        """The session is alive at `now`. `by`: whose key says so; None is the server itself.

        Raises:
            GoneError: it was finished, or has expired.
            NotFoundError: no such session of this tenant.
            ForbiddenError: the key's scope is less than full, and another key opened the session.
        """
        with self._database.write(is_durable=False) as conn:
            if by is not None and not by.scope.allows(Scope.FULL):
                _require_opener(conn, by, session_id, "keeping alive")
            if not conn.execute(_BEAT, {"id": session_id, "of_tenant": tenant_id, "now": now}).rowcount:
                row = _get(conn, tenant_id, session_id)
                raise GoneError(f"session {session_id} has ended ({row.finish_reason}); open a new one")

    def finish(
        self,
        tenant_id: TenantId,
        session_id: SessionId,
        reason: str,
        detail: str | None,
        now: float,
        *,
        by: Principal | None = None,
    ) -> set[str]:
        """End the session. Only its first end counts; a later one changes nothing. `by`: whose key asks for it; None is
        the server itself.

        Returns:
            The base models of which samples were cancelled.

        Raises:
            NotFoundError: no such session of this tenant.
            ForbiddenError: the key's scope is less than full, and another key opened the session.
        """
        values = {"id": session_id, "of_tenant": tenant_id, "reason": reason, "detail": detail, "now": now}
        with self._database.write() as conn:
            if by is not None and not by.scope.allows(Scope.FULL):
                _require_opener(conn, by, session_id, "ending")
            if conn.execute(_FINISH, values).rowcount:
                return cancel_samples(conn, [session_id], now)
            _get(conn, tenant_id, session_id)
            return set()

    def set_project(
        self, tenant_id: TenantId, session_id: SessionId, project_id: str, by: Principal | None, now: float
    ) -> None:
        """Move the session, and its runs and samplers with it, into a project. `by` stands in the audit log; a move to
        where it is already is none.

        Raises:
            NotFoundError: no such session of this tenant.
        """
        with self._database.write() as conn:
            row = _get(conn, tenant_id, session_id)
            if row.project_id == project_id:
                return
            conn.execute(_SET_PROJECT, {"id": session_id, "project": project_id})
            details = {"session_id": session_id, "project_id": project_id, "from_project_id": row.project_id or ""}
            note(conn, "project_session_set", tenant_id, by, details, now)

    def expire(self, silent_since: float, now: float) -> Sequence[SessionId]:
        """End all sessions whose last heartbeat is older than `silent_since`; their ids. Writes nothing if none is."""
        with self._database.read() as conn, readable(conn):
            if conn.execute(_SILENT.limit(1), {"before": silent_since}).first() is None:
                return []
        with self._database.write() as conn:
            with readable(conn):
                ended = conn.execute(_EXPIRE, {"before": silent_since, "now": now}).scalars().all()
            expired = sorted(SessionId(str(session_id)) for session_id in ended)
            cancel_samples(conn, expired, now)
        return expired

    def drop_empty(self, ended_before: float, limit: int = 1000) -> int:
        """Drop sessions that ended before that time and that nothing refers to: no run, sampler or loss, and no usage.

        Returns:
            How many; `limit` means that there may be more.
        """
        values = {"before": ended_before, "limit": limit}
        with self._database.read() as conn, readable(conn):
            if conn.execute(_EMPTY, {**values, "limit": 1}).first() is None:
                return 0
        with self._database.write() as conn:
            with readable(conn):
                empty = conn.execute(_EMPTY, values).scalars().all()
            return conn.execute(_DROP, {"session_ids": empty}).rowcount

    def ended_among(self, run_ids: Collection[RunId]) -> set[RunId]:
        """Those of the runs whose session has ended, or that were let go. Give at most some 10000 at once."""
        with self._database.read() as conn:
            return {run_id for (run_id,) in _ENDED_AMONG.all(conn, {"run_ids": [*run_ids]})}

    def list(self, tenant_id: TenantId, limit: int, offset: int) -> tuple[SessionRows, int]:
        """One page, newest first, and how many there are in all."""
        with self._database.read() as conn:
            total = conn.execute(_COUNT, {"tenant_id": tenant_id}).scalar_one()
            rows = conn.execute(_LIST, {"tenant_id": tenant_id, "limit": limit, "offset": offset})
            return [to_session(row) for row in rows], total

    def children(self, tenant_id: TenantId, session_id: SessionId) -> tuple[Sequence[RunId], Sequence[SamplerId]]:
        """(ids of its runs, ids of its samplers), oldest first.

        Raises:
            NotFoundError: no such session of this tenant.
        """
        with self._database.read() as conn:
            _get(conn, tenant_id, session_id)
            run_ids = conn.execute(_RUNS, {"session_id": session_id}).scalars().all()
            sampler_ids = conn.execute(_SAMPLERS, {"session_id": session_id}).scalars().all()
        return run_ids, sampler_ids


def _get(conn: Connection, tenant_id: TenantId, session_id: SessionId) -> SessionRow:
    row = conn.execute(_GET, {"session_id": session_id, "tenant_id": tenant_id}).first()
    if row is None:
        raise NotFoundError(f"no session {session_id}")
    return to_session(row)


def _require_opener(conn: Connection, by: Principal, session_id: SessionId, act: str) -> None:
    """The key opened the session, or took the place of the one that did. Who did is not known of old sessions."""
    found = conn.execute(_OPENER, {"session_id": session_id, "tenant_id": by.tenant_id}).first()
    if found is None:
        raise NotFoundError(f"no session {session_id}")
    opener = found.key_id
    while opener not in (None, by.key_id):
        opener = conn.execute(_SUCCESSOR, {"key_id": opener}).scalar()
    if opener is None and found.key_id is not None:
        raise ForbiddenError(
            f"{act} a session that another key opened needs a key of scope full, and this key's scope is {by.scope}"
        )


def to_session(row: Sequence[Any]) -> SessionRow:
    session_id, tenant_id, tags, *rest = row
    return SessionRow(session_id, tenant_id, tuple(tags), *rest)
