"""Custom losses: what a session uploaded, frozen under an id. The graph is a file; it is unique to its row.

What stays true: an op that computes with a loss pins the file (`ops.pin_blob`), so it outlives its row until a snapshot
covers the op or the op has failed.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from tinsmith.errors import GoneError, NotFoundError
from tinsmith.store.checksums import crc_of
from tinsmith.store.database import Database
from tinsmith.store.graveyard import bury
from tinsmith.store.op_rows import WHOLE, born, to_columns, to_op
from tinsmith.store.rows import Enqueued, LossRow, NewLoss, NewOp
from tinsmith.store.schema import custom_losses, ops, sessions
from tinsmith.types import OpState, SessionId, TenantId

_GET = select(custom_losses.c.loss_id, custom_losses.c.blob).where(
    custom_losses.c.loss_id == bindparam("loss_id"),
    custom_losses.c.tenant_id == bindparam("tenant_id"),
    custom_losses.c.session_id == bindparam("session_id"),
)
_IS_THERE = select(custom_losses.c.loss_id).where(custom_losses.c.loss_id == bindparam("loss_id"))
_COUNT = select(func.count()).select_from(custom_losses).where(custom_losses.c.session_id == bindparam("session_id"))
_SESSION = (
    select(sessions.c.session_id)
    .where(sessions.c.session_id == bindparam("session_id"), sessions.c.tenant_id == bindparam("tenant_id"))
    .with_for_update()
)
_OP = select(*WHOLE).where(ops.c.op_id == bindparam("op_id"))
_INSERT = insert(custom_losses).inline()
_INSERT_OP = insert(ops).inline()
_RETIRED = (
    select(custom_losses.c.loss_id, custom_losses.c.blob)
    .join(sessions, sessions.c.session_id == custom_losses.c.session_id)
    .where(sessions.c.finished_at < bindparam("before"))
    .limit(bindparam("limit"))
)
_DELETE = delete(custom_losses).where(custom_losses.c.loss_id.in_(bindparam("loss_ids", expanding=True)))


class Losses:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, session_id: SessionId, op: NewOp, new: NewLoss | None, result: bytes, now: float) -> Enqueued:
        """Record a loss and the op that made it, which is DONE with `result` at once; with `op.failure` (and no `new`)
        it is FAILED. An op whose id is taken gets the first one's row, untouched.

        Raises:
            NotFoundError: the session is not the tenant's.
            GoneError: the loss was uploaded long ago.
        """
        with self._database.write() as conn:
            if conn.execute(_SESSION, {"session_id": session_id, "tenant_id": op.tenant_id}).first() is None:
                raise NotFoundError(f"no session {session_id}")
            first = conn.execute(_OP, {"op_id": op.id}).first()
            if first is not None:
                return Enqueued(to_op(first), is_new=False)
            if new is not None and conn.execute(_IS_THERE, {"loss_id": new.loss_id}).first() is not None:
                raise GoneError(f"custom loss {new.loss_id} was uploaded before, and the answer to that has expired")
            if new is not None:
                conn.execute(_INSERT, _to_columns(session_id, op.tenant_id, new, now))
            conn.execute(
                _INSERT_OP, {**to_columns(born(op, now)), **(_outcome(result, now) if new is not None else {})}
            )
            return Enqueued(to_op(_one(conn, op)), is_new=True)

    def get(self, tenant_id: TenantId, session_id: SessionId, loss_id: str) -> LossRow:
        """Raises: NotFoundError: no such loss of this session of this tenant."""
        values = {"loss_id": loss_id, "tenant_id": tenant_id, "session_id": session_id}
        with self._database.read() as conn:
            row = conn.execute(_GET, values).first()
        if row is None:
            raise NotFoundError(f"no custom loss {loss_id[:200]!r} in session {session_id}")
        return LossRow(loss_id=row.loss_id, blob=row.blob)

    def count(self, session_id: SessionId) -> int:
        with self._database.read() as conn:
            return int(conn.execute(_COUNT, {"session_id": session_id}).scalar_one())

    def retire(self, finished_before: float, now: float, limit: int = 1000) -> int:
        """Drop the losses of sessions that ended before that time; their files go to the graveyard, where those that
        ops still need stay. Later requests answer NotFoundError.

        Returns:
            How many; `limit` means that there may be more.
        """
        with self._database.read() as conn:
            if conn.execute(_RETIRED, {"before": finished_before, "limit": 1}).first() is None:
                return 0
        with self._database.write() as conn:
            retired = conn.execute(_RETIRED, {"before": finished_before, "limit": limit}).all()
            conn.execute(_DELETE, {"loss_ids": [row.loss_id for row in retired]})
            bury(conn, [row.blob for row in retired], now)
        return len(retired)


def _to_columns(session_id: SessionId, tenant_id: TenantId, new: NewLoss, now: float) -> dict[str, Any]:
    return {
        "loss_id": new.loss_id,
        "tenant_id": tenant_id,
        "session_id": session_id,
        "name": new.name,
        "blob": new.blob,
        "created_at": now,
    }


def _outcome(result: bytes, now: float) -> dict[str, Any]:
    return {
        "state": OpState.DONE.value,
        "finished_at": now,
        "result": result,
        "result_crc": crc_of(result),
        "result_bytes": len(result),
        "result_media": "application/json",
    }


def _one(conn: Connection, op: NewOp) -> Any:
    return conn.execute(_OP, {"op_id": op.id}).one()
