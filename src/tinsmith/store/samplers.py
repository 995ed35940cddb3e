"""Samplers: a base model with or without a run's weights, frozen under an id; those of inflight samplers move on.

Owns the rows; a sampler keeps its file from being deleted (see graveyard.py). The inflight samplers of a run all have
the weights of its newest inflight save.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Text, bindparam, case, delete, exists, func, insert, select, update
from sqlalchemy import cast as sql_cast

from tinsmith.errors import NotFoundError
from tinsmith.store.checksums import row_changed
from tinsmith.store.database import Database
from tinsmith.store.fences import require_current
from tinsmith.store.graveyard import bury
from tinsmith.store.prepared import readable
from tinsmith.store.rows import NewSampler, SamplerRow, SamplerWeights, WorkerId
from tinsmith.store.run_rows import to_spec
from tinsmith.store.schema import ops, runs, samplers, sessions
from tinsmith.types import BlobKey, RunStatus, SamplerId, TenantId

_COLUMNS = (
    samplers.c.sampler_id, samplers.c.tenant_id, samplers.c.session_id, samplers.c.base_model, samplers.c.model_path,
    samplers.c.run_id, samplers.c.blob, samplers.c.spec, samplers.c.created_at,
    samplers.c.promised_seq,
)  # fmt: skip
_GET_ANY = select(*_COLUMNS).where(samplers.c.sampler_id == bindparam("sampler_id"))
_GET = _GET_ANY.where(samplers.c.tenant_id == bindparam("tenant_id"))
_SESSION = select(sessions.c.session_id).where(
    sessions.c.session_id == bindparam("session_id"), sessions.c.tenant_id == bindparam("tenant_id")
)
_INSERT = insert(samplers).inline()
_OLD_TARGETS = select(samplers.c.blob).where(samplers.c.run_id == bindparam("of_run"), samplers.c.is_inflight)
_RETARGET = (
    update(samplers)
    .where(samplers.c.run_id == bindparam("of_run"), samplers.c.is_inflight)
    .values(blob=bindparam("new_blob"), promised_seq=bindparam("new_promised_seq"))
)
_SPEC = sql_cast(samplers.c.spec, Text)
_RANK = case(
    (func.json_valid(_SPEC) == 1, cast(Any, samplers.c.spec)["rank"].as_integer()),
    else_=None,
).label("rank")
_WEIGHTS = (
    select(samplers.c.sampler_id, samplers.c.blob, samplers.c.promised_seq, _RANK, runs.c.status)
    .outerjoin(runs, runs.c.run_id == samplers.c.run_id)
    .where(samplers.c.sampler_id.in_(bindparam("sampler_ids", expanding=True)))
)
_REDEEM = (
    update(samplers).where(samplers.c.blob == bindparam("promised")).values(blob=bindparam("made"), promised_seq=None)
)
_USED = select(samplers.c.sampler_id).where(samplers.c.blob == bindparam("made")).limit(1)
_JOIN = (
    update(samplers)
    .where(samplers.c.sampler_id == bindparam("id"), samplers.c.tenant_id == bindparam("of_tenant"))
    .values(num_joined=samplers.c.num_joined + 1)
    .returning(samplers.c.num_joined)
)
_RETIRED = (
    select(samplers.c.sampler_id, samplers.c.blob)
    .join(sessions, sessions.c.session_id == samplers.c.session_id)
    .where(
        sessions.c.finished_at < bindparam("before"),
        ~exists().where(ops.c.sampler_id == samplers.c.sampler_id, ops.c.state.in_(["queued", "running"])),
    )
    .limit(bindparam("limit"))
)
_DELETE = delete(samplers).where(samplers.c.sampler_id.in_(bindparam("sampler_ids", expanding=True)))


class Samplers:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, new: NewSampler, now: float) -> SamplerRow:
        """The sampler with this id: the new one, or the one that was there first.

        Raises:
            NotFoundError: the session is not the tenant's, or the id belongs to another tenant.
        """
        with self._database.write() as conn:
            return put_sampler(conn, new, now)

    def get(self, tenant_id: TenantId, sampler_id: SamplerId) -> SamplerRow:
        """Raises: NotFoundError: no such sampler of this tenant."""
        with self._database.read() as conn:
            row = conn.execute(_GET, {"sampler_id": sampler_id, "tenant_id": tenant_id}).first()
        return _found(row, sampler_id)

    def get_any(self, sampler_id: SamplerId) -> SamplerRow:
        """For the worker, whose ops were checked when they arrived.

        Raises:
            NotFoundError: no such sampler.
            CorruptError: its row was changed on the disk.
        """
        try:
            with self._database.read() as conn, readable(conn):
                row = conn.execute(_GET_ANY, {"sampler_id": sampler_id}).first()
            found = _found(row, sampler_id)
        except ValueError:  # no JSON, or of something else
            raise row_changed(f"the sampler {sampler_id}") from None
        if not isinstance(found.blob, str | None):
            raise row_changed(f"the sampler {sampler_id}")
        return found

    def weights(self, sampler_ids: Collection[SamplerId]) -> dict[SamplerId, SamplerWeights]:
        """What these samplers sample from; those that don't exist are left out. Give at most some 10000 at once."""
        if not sampler_ids:
            return {}
        with self._database.read() as conn, readable(conn):
            rows = conn.execute(_WEIGHTS, {"sampler_ids": list(sampler_ids)}).all()
        return {
            row.sampler_id: SamplerWeights(
                cast(BlobKey | None, row.blob),
                is_promised=row.promised_seq is not None,
                is_lost=row.promised_seq is not None and row.status == RunStatus.CORRUPTED,
                is_full=row.rank == 0,
            )
            for row in rows
            if row.blob is None or isinstance(row.blob, str)  # another is of a row that was changed: see `get_any`
        }

    def redeem(self, worker: WorkerId, promised: BlobKey, made: BlobKey) -> bool:
        """The file that was promised is `made`. False: no sampler needs it.

        Raises:
            FencedError: the worker's place was taken.
        """
        with self._database.write() as conn:
            require_current(conn, worker)
            conn.execute(_REDEEM, {"promised": promised, "made": made})
            return conn.execute(_USED, {"made": made}).first() is not None

    def join(self, tenant_id: TenantId, sampler_id: SamplerId) -> int:
        """A number for one more client of the sampler, from 1; never given twice.

        Raises:
            NotFoundError: no such sampler of this tenant.
        """
        with self._database.write() as conn:
            number = conn.execute(_JOIN, {"id": sampler_id, "of_tenant": tenant_id}).scalar()
        if number is None:
            raise NotFoundError(f"no sampler {sampler_id}")
        return int(number)

    def retire(self, finished_before: float, now: float, limit: int = 1000) -> int:
        """Drop the samplers of sessions that ended before that time, unless requests still wait for them; their files
        go to the graveyard. Later requests answer NotFoundError.

        Returns:
            How many; `limit` means that there may be more.
        """
        with self._database.read() as conn:
            if conn.execute(_RETIRED, {"before": finished_before, "limit": 1}).first() is None:
                return 0
        with self._database.write() as conn:
            retired = conn.execute(_RETIRED, {"before": finished_before, "limit": limit}).all()
            conn.execute(_DELETE, {"sampler_ids": [row.sampler_id for row in retired]})
            bury(conn, [row.blob for row in retired], now)
        return len(retired)


def put_sampler(conn: Connection, new: NewSampler, now: float) -> SamplerRow:
    """See `Samplers.create`; within the caller's transaction."""
    row = conn.execute(_GET_ANY, {"sampler_id": new.sampler_id}).first()
    if row is not None:
        if row.tenant_id != new.tenant_id:
            raise NotFoundError(f"no sampler {new.sampler_id}")
        return _to_sampler(row)
    if conn.execute(_SESSION, {"session_id": new.session_id, "tenant_id": new.tenant_id}).first() is None:
        raise NotFoundError(f"no session {new.session_id}")
    if new.is_inflight:
        replaced = conn.execute(_OLD_TARGETS, {"of_run": new.run_id}).scalars().all()
        conn.execute(_RETARGET, {"of_run": new.run_id, "new_blob": new.blob, "new_promised_seq": new.promised_seq})
        bury(conn, replaced, now)
    conn.execute(
        _INSERT,
        {
            "sampler_id": new.sampler_id,
            "tenant_id": new.tenant_id,
            "session_id": new.session_id,
            "base_model": new.base_model,
            "model_path": new.model_path,
            "run_id": new.run_id,
            "blob": new.blob,
            "spec": new.spec,
            "created_at": now,
            "is_inflight": new.is_inflight,
            "promised_seq": new.promised_seq,
        },
    )
    return SamplerRow(
        sampler_id=new.sampler_id,
        tenant_id=new.tenant_id,
        session_id=new.session_id,
        base_model=new.base_model,
        model_path=new.model_path,
        run_id=new.run_id,
        blob=new.blob,
        spec=new.spec,
        created_at=now,
        promised_seq=new.promised_seq,
    )


def _found(row: Sequence[Any] | None, sampler_id: SamplerId) -> SamplerRow:
    if row is None:
        raise NotFoundError(f"no sampler {sampler_id}")
    return _to_sampler(row)


def _to_sampler(row: Sequence[Any]) -> SamplerRow:
    sampler_id, tenant_id, session_id, base_model, model_path, run_id, blob, spec, created_at, promised_seq = row
    return SamplerRow(
        sampler_id=sampler_id,
        tenant_id=tenant_id,
        session_id=session_id,
        base_model=base_model,
        model_path=model_path,
        run_id=run_id,
        blob=blob,
        spec=None if spec is None else to_spec(spec),
        created_at=created_at,
        promised_seq=promised_seq,
    )
