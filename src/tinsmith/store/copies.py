"""Copies of checkpoints: a new name in a new run that points at the same file.

No bytes are copied: a file stays while any name points at it (see graveyard.py). What stays true:

* A run that holds a copy is never trained: its place in the log is taken by a CREATE op that has failed already, so
  that no other run can be made there, and no worker ever leases it.
* A request that is sent again finds its copy: by its key, or by its place in the session.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select

from tinsmith.errors import GoneError, NotFoundError, UserError
from tinsmith.store.audit import note
from tinsmith.store.checkpoints import put_checkpoint
from tinsmith.store.database import Database
from tinsmith.store.gone import require_there
from tinsmith.store.op_rows import born, to_columns
from tinsmith.store.rows import NewCheckpoint, NewCopy, NewOp, NewRun, Principal
from tinsmith.store.run_rows import new_run_columns
from tinsmith.store.schema import checkpoints, ops, runs, sessions
from tinsmith.store.session_bounds import require_not_too_many
from tinsmith.types import Failure, OpId, OpKind, RunId, RunStatus, SessionId, TenantId

COPIED = "copied"  # finish_reason of a session that was made for a copy
SOURCE = "copied_from"  # in the metadata of the copy's run
UNTRAINABLE = (
    "this run holds copied or imported checkpoints and can't be trained: make one from them with "
    "create_training_client_from_state"
)

_SESSION = select(sessions.c.finished_at, sessions.c.finish_reason).where(
    sessions.c.session_id == bindparam("session_id"), sessions.c.tenant_id == bindparam("tenant_id")
)
_INSERT_SESSION = insert(sessions).inline()
_INSERT_RUN = insert(runs).inline()
_INSERT_OP = insert(ops).inline()
_TAKEN = select(ops.c.op_id).where(ops.c.run_id == bindparam("run_id"), ops.c.seq_id == 0)
_RUN = select(runs.c.status, runs.c.user_metadata).where(
    runs.c.run_id == bindparam("run_id"), runs.c.tenant_id == bindparam("tenant_id")
)
_SOURCE = (
    select(runs.c.user_metadata)
    .join(checkpoints, checkpoints.c.run_id == runs.c.run_id)
    .where(
        checkpoints.c.run_id == bindparam("run_id"),
        checkpoints.c.kind == bindparam("kind"),
        checkpoints.c.name == bindparam("name"),
        checkpoints.c.blob == bindparam("blob"),
    )
)


class Copies:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, new: NewCopy, now: float, *, most_sessions: int | None = None) -> str:
        """The path of the copy: a new one, or the one that an equal request made before. most_sessions: as for
        `Sessions.create`, since a copy without a session gets one of its own.

        Raises:
            CapacityError: too many sessions were opened lately.
            GoneError: the session has ended, or the copy that was made before was let go.
            NotFoundError: the session is not the tenant's, or the source has gone meanwhile.
            UserError: another run, or a copy of something else, has the place or the key.
        """
        with self._database.write() as conn:
            session_id = new.session_id or _own_session(conn, new, now, most_sessions)
            session = conn.execute(_SESSION, {"session_id": session_id, "tenant_id": new.tenant_id}).first()
            if session is None:
                raise NotFoundError(f"no session {session_id}")
            run_id = RunId(f"{session_id}:train:{new.model_seq_id}")
            path = f"tinker://{run_id}/{new.source.kind}/{new.source.name}"
            require_there(conn, run_id)
            if conn.execute(_TAKEN, {"run_id": run_id}).first() is not None:
                _require_same(conn, new, run_id)
                return path
            if new.session_id is not None and session.finished_at is not None:
                raise GoneError(f"session {session_id} has ended ({session.finish_reason}): make a new ServiceClient")
            _insert(conn, new, run_id, session_id, now)
            note(conn, "checkpoint_copy", new.tenant_id, new.by, {"tinker_path": path, "source": new.source.path}, now)
        return path


def _own_session(conn: Connection, new: NewCopy, now: float, most: int | None) -> SessionId:
    """A session that has ended already, for the copy alone."""
    session_id = own_session_id(new.tenant_id, new.request_key)
    open_ended(conn, session_id, new.tenant_id, new.project_id, new.by, COPIED, now, most)
    return session_id


def own_session_id(tenant_id: TenantId, request_key: str | None) -> SessionId:
    """Always the same for a key, always a new one without."""
    number = secrets.token_hex(12)
    if request_key is not None:
        number = hashlib.sha256(f"{tenant_id}\n{request_key}".encode()).hexdigest()[:24]
    return SessionId("s" + number)


def open_ended(
    conn: Connection,
    session_id: SessionId,
    tenant_id: TenantId,
    project_id: str | None,
    by: Principal | None,
    reason: str,
    now: float,
    most_sessions: int | None = None,
) -> None:
    """A session that has ended already, for what is put into it now; nothing if it is there.

    Raises:
        CapacityError: too many sessions were opened lately.
    """
    if conn.execute(_SESSION, {"session_id": session_id, "tenant_id": tenant_id}).first() is None:
        if most_sessions is not None:
            require_not_too_many(conn, tenant_id, most_sessions, now)
        values: dict[str, Any] = {
            "session_id": session_id,
            "tenant_id": tenant_id,
            "tags": [],
            "user_metadata": {},
            "project_id": project_id,
            "created_at": now,
            "last_beat_at": now,
            "finished_at": now,
            "finish_reason": reason,
            "key_id": None if by is None else by.key_id,
        }
        conn.execute(_INSERT_SESSION, values)


def _require_same(conn: Connection, new: NewCopy, run_id: RunId) -> None:
    row = conn.execute(_RUN, {"run_id": run_id, "tenant_id": new.tenant_id}).first()
    if row is None or row.status != RunStatus.COPY or row.user_metadata.get(SOURCE) != new.source.path:
        where = f"model_seq_id {new.model_seq_id} of this session" if new.session_id else "this X-Idempotency-Key"
        raise UserError(f"{where} has been used for something else: take a new one")


def _insert(conn: Connection, new: NewCopy, run_id: RunId, session_id: SessionId, now: float) -> None:
    source = new.source
    place = {"run_id": source.run_id, "kind": source.kind.value, "name": source.name, "blob": source.blob}
    found = conn.execute(_SOURCE, place).first()
    if found is None:
        raise NotFoundError(f"no checkpoint {source.path}")
    kept = found.user_metadata if new.keeps_metadata else {}
    spec = replace(source.spec, run_id=run_id)
    run = NewRun(new.tenant_id, session_id, new.model_seq_id, spec, {**kept, SOURCE: source.path})
    put_untrainable(conn, run, now)
    checkpoint = NewCheckpoint(
        run_id=run_id,
        kind=source.kind,
        name=source.name,
        blob=source.blob,
        size_bytes=source.size_bytes,
        sha256=source.sha256,
        expires_at=new.expires_at,
        user_metadata=source.user_metadata if new.keeps_metadata else {},
        has_optimizer=source.has_optimizer,
    )
    put_checkpoint(conn, new.tenant_id, checkpoint, now, None if new.by is None else new.by.key_id)


def put_untrainable(conn: Connection, run: NewRun, now: float) -> None:
    """A run that holds checkpoints alone: its CREATE has failed already."""
    conn.execute(_INSERT_RUN, {**new_run_columns(run, now), "status": RunStatus.COPY.value, "wants_worker": False})
    op = NewOp(
        tenant_id=run.tenant_id,
        kind=OpKind.CREATE,
        base_model=run.spec.base_model,
        id=OpId(f"req-{uuid.uuid4().hex}"),
        seq_id=0,
        run_id=run.spec.run_id,
        failure=Failure(UserError.code, UserError.category, UNTRAINABLE),
    )
    conn.execute(_INSERT_OP, to_columns(born(op, now)))
