"""Checkpoints: names that point at immutable files, and the deletion of files that nothing points at.

A name points at what was put last; the file that it pointed at before goes to the graveyard, and so does that of a
deleted or expired checkpoint. `collect` hands a buried file out for deletion once no sampler, no other checkpoint and
no CREATE or LOAD that a snapshot doesn't cover yet refers to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import Connection, bindparam, delete, func, insert, or_, select, update

from tinsmith.errors import NotFoundError
from tinsmith.store.audit import note
from tinsmith.store.database import Database
from tinsmith.store.graveyard import bury, forget, unneeded
from tinsmith.store.ledger import end_span, open_span
from tinsmith.store.rows import CheckpointRow, NewCheckpoint, Principal
from tinsmith.store.run_rows import to_spec
from tinsmith.store.schema import checkpoints, runs
from tinsmith.types import BlobKey, CheckpointKind, RunId, TenantId

COLLECT_GRACE_S = 60.0  # between looking up a checkpoint and enqueueing the op that pins its file
COLLECT_AT_MOST = 1000

BlobKeys: TypeAlias = list[BlobKey]
CheckpointRows: TypeAlias = list[CheckpointRow]  # within the class, `list` is a method

_COLUMNS = (
    checkpoints.c.tenant_id, checkpoints.c.run_id, checkpoints.c.kind, checkpoints.c.name, checkpoints.c.blob,
    checkpoints.c.size_bytes, checkpoints.c.sha256, checkpoints.c.created_at, checkpoints.c.expires_at,
    checkpoints.c.user_metadata, checkpoints.c.has_optimizer, checkpoints.c.is_public,
    runs.c.spec,
)  # fmt: skip
_IS_TENANTS = checkpoints.c.tenant_id == bindparam("tenant_id")
_IS_LIVE = or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > bindparam("now"))
_IS_NAMED = (
    (checkpoints.c.run_id == bindparam("of_run"))
    & (checkpoints.c.kind == bindparam("of_kind"))
    & (checkpoints.c.name == bindparam("of_name"))
)
_ALL = select(*_COLUMNS).join(runs, runs.c.run_id == checkpoints.c.run_id)
_GET = _ALL.where(_IS_NAMED, _IS_TENANTS, _IS_LIVE)
_GET_READABLE = _ALL.where(_IS_NAMED, or_(_IS_TENANTS, checkpoints.c.is_public), _IS_LIVE)
_GET_ANY = _ALL.where(_IS_NAMED, _IS_LIVE)
_OF_RUN = _ALL.where(checkpoints.c.run_id == bindparam("of_run"), _IS_TENANTS, _IS_LIVE).order_by(
    checkpoints.c.created_at.desc(), checkpoints.c.kind, checkpoints.c.name
)
_LAST = (
    _ALL.where(
        checkpoints.c.run_id == bindparam("of_run"), checkpoints.c.kind == bindparam("of_kind"), _IS_TENANTS, _IS_LIVE
    )
    .order_by(checkpoints.c.created_at.desc(), checkpoints.c.name)
    .limit(1)
)
_IS_OF_KINDS = checkpoints.c.kind.in_(bindparam("kinds", expanding=True))
_LIST = (
    _ALL.where(_IS_TENANTS, _IS_LIVE, _IS_OF_KINDS)
    .order_by(checkpoints.c.created_at.desc(), checkpoints.c.run_id, checkpoints.c.kind, checkpoints.c.name)
    .limit(bindparam("limit"))
    .offset(bindparam("offset"))
)
_COUNT = select(func.count()).select_from(checkpoints).where(_IS_TENANTS, _IS_LIVE, _IS_OF_KINDS)
_RUN = select(runs.c.run_id).where(runs.c.run_id == bindparam("run_id"), runs.c.tenant_id == bindparam("tenant_id"))
_EARLIER = select(checkpoints.c.blob).where(_IS_NAMED).with_for_update()
_TAKEN = select(checkpoints.c.blob).where(_IS_NAMED, _IS_LIVE)
_INSERT = insert(checkpoints).inline()
_DELETE = delete(checkpoints).where(_IS_NAMED)
_SET_EXPIRY = update(checkpoints).where(_IS_NAMED).values(expires_at=bindparam("until"))
_SET_PUBLIC = update(checkpoints).where(_IS_NAMED).values(is_public=bindparam("public"))
_EXPIRED = select(checkpoints.c.blob).where(checkpoints.c.expires_at <= bindparam("now"))
_DELETE_EXPIRED = delete(checkpoints).where(checkpoints.c.expires_at <= bindparam("now"))


class Checkpoints:
    """Where a call takes an optional `now`, the default is the clock; an expired checkpoint is not found."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, tenant_id: TenantId, new: NewCheckpoint, now: float) -> None:
        """Point the name at a file that is on disk.

        Raises:
            NotFoundError: the run is not the tenant's.
        """
        with self._database.write() as conn:
            put_checkpoint(conn, tenant_id, new, now)

    def get(
        self, tenant_id: TenantId, run_id: RunId, kind: CheckpointKind, name: str, now: float | None = None
    ) -> CheckpointRow:
        """Raises: NotFoundError: no such checkpoint of this tenant, or it has expired."""
        with self._database.read() as conn:
            return _get(conn, tenant_id, run_id, kind, name, now)

    def get_readable(
        self, tenant_id: TenantId, run_id: RunId, kind: CheckpointKind, name: str, now: float | None = None
    ) -> CheckpointRow:
        """As `get`, and another tenant's checkpoint if it is public."""
        with self._database.read() as conn:
            row = conn.execute(_GET_READABLE, _key(tenant_id, run_id, kind, name, now)).first()
        return _found(row, run_id, kind, name)

    def get_any(self, run_id: RunId, kind: CheckpointKind, name: str, now: float | None = None) -> CheckpointRow:
        """Of whatever tenant: for those who show a signed link to it.

        Raises:
            NotFoundError: no such checkpoint, or it has expired.
        """
        with self._database.read() as conn:
            row = conn.execute(_GET_ANY, {**_named(run_id, kind, name), "now": _clock(now)}).first()
        return _found(row, run_id, kind, name)

    def list_run(self, tenant_id: TenantId, run_id: RunId, now: float | None = None) -> CheckpointRows:
        """All of a run, newest first.

        Raises:
            NotFoundError: the run is not the tenant's.
        """
        with self._database.read() as conn:
            _require_run(conn, tenant_id, run_id)
            rows = conn.execute(_OF_RUN, {"of_run": run_id, "tenant_id": tenant_id, "now": _clock(now)})
            return [_to_checkpoint(row) for row in rows]

    def list(
        self,
        tenant_id: TenantId,
        limit: int,
        offset: int,
        kinds: Iterable[CheckpointKind] = CheckpointKind,
        now: float | None = None,
    ) -> tuple[CheckpointRows, int]:
        """One page of those of the kinds, newest first, and how many of them there are in all."""
        values = {"tenant_id": tenant_id, "kinds": [kind.value for kind in kinds], "now": _clock(now)}
        with self._database.read() as conn:
            total = conn.execute(_COUNT, values).scalar_one()
            rows = conn.execute(_LIST, {**values, "limit": limit, "offset": offset})
            return [_to_checkpoint(row) for row in rows], total

    def delete(
        self,
        tenant_id: TenantId,
        run_id: RunId,
        kind: CheckpointKind,
        name: str,
        now: float | None = None,
        *,
        by: Principal | None = None,
    ) -> None:
        """Take the name away; samplers and loads that use the file already keep it. `by` stands in the audit log.

        Raises:
            NotFoundError: as `get`.
        """
        with self._database.write() as conn:
            row = _get(conn, tenant_id, run_id, kind, name, now)
            conn.execute(_DELETE, _named(run_id, kind, name))
            bury(conn, [row.blob], _clock(now))
            end_span(conn, _named(run_id, kind, name), _clock(now), _clock(now))
            note(conn, "checkpoint_delete", tenant_id, by, about(row), _clock(now))

    def set_expiry(
        self,
        tenant_id: TenantId,
        run_id: RunId,
        kind: CheckpointKind,
        name: str,
        expires_at: float | None,
        now: float | None = None,
        *,
        by: Principal | None = None,
    ) -> None:
        """`by` stands in the audit log.

        Raises:
            NotFoundError: as `get`.
        """
        with self._database.write() as conn:
            row = _get(conn, tenant_id, run_id, kind, name, now)
            conn.execute(_SET_EXPIRY, {**_named(run_id, kind, name), "until": expires_at})
            end_span(conn, _named(run_id, kind, name), expires_at, _clock(now))
            until = "never" if expires_at is None else f"{expires_at:.3f}"
            note(conn, "checkpoint_ttl_set", tenant_id, by, {**about(row), "expires_at": until}, _clock(now))

    def set_public(
        self,
        tenant_id: TenantId,
        run_id: RunId,
        kind: CheckpointKind,
        name: str,
        is_public: bool,
        now: float | None = None,
        by: Principal | None = None,
    ) -> None:
        """Let other tenants use its path, or no longer; doing it again changes nothing and is no act.

        Raises:
            NotFoundError: as `get`.
        """
        with self._database.write() as conn:
            row = _get(conn, tenant_id, run_id, kind, name, now)
            if row.is_public == is_public:
                return
            conn.execute(_SET_PUBLIC, {**_named(run_id, kind, name), "public": is_public})
            act = "checkpoint_publish" if is_public else "checkpoint_unpublish"
            note(conn, act, tenant_id, by, about(row), _clock(now))

    def hand_out(
        self,
        tenant_id: TenantId,
        run_id: RunId,
        kind: CheckpointKind,
        name: str,
        event: str,
        details: Mapping[str, str],
        now: float | None = None,
        by: Principal | None = None,
    ) -> CheckpointRow:
        """The checkpoint, to which somebody is about to get a token or a link; that stands in the audit log first.

        Raises:
            NotFoundError: as `get`.
        """
        with self._database.write() as conn:
            row = _get(conn, tenant_id, run_id, kind, name, now)
            note(conn, event, tenant_id, by, {**about(row), **details}, _clock(now))
        return row

    def last(
        self, tenant_id: TenantId, run_id: RunId, now: float | None = None
    ) -> tuple[CheckpointRow | None, CheckpointRow | None]:
        """The run's newest (training checkpoint, sampler checkpoint). Both None for a run that is not the tenant's."""
        found: dict[CheckpointKind, CheckpointRow | None] = {}
        with self._database.read() as conn:
            for kind in CheckpointKind:
                values = {"of_run": run_id, "of_kind": kind.value, "tenant_id": tenant_id, "now": _clock(now)}
                row = conn.execute(_LAST, values).first()
                found[kind] = None if row is None else _to_checkpoint(row)
        return found[CheckpointKind.TRAINING], found[CheckpointKind.SAMPLER]

    def collect(self, now: float) -> BlobKeys:
        """Drop expired checkpoints, and hand out files that nothing refers to any more: theirs, those of deleted and
        replaced checkpoints, of retired samplers, of payloads without use and of expired results.

        A file is handed out no earlier than `COLLECT_GRACE_S` after it was buried, at most `COLLECT_AT_MOST` at once,
        and once only: the caller deletes it. A crash in between leaves a file that no row names.
        """
        before = now - COLLECT_GRACE_S
        with self._database.read() as conn:
            has_expired = conn.execute(_EXPIRED.limit(1), {"now": now}).first() is not None
            if not has_expired and not unneeded(conn, before, 1):
                return []
        with self._database.write() as conn:
            bury(conn, conn.execute(_EXPIRED, {"now": now}).scalars().all(), now)
            conn.execute(_DELETE_EXPIRED, {"now": now})
            blobs = unneeded(conn, before, COLLECT_AT_MOST)
            forget(conn, blobs)
        return blobs


def put_checkpoint(
    conn: Connection, tenant_id: TenantId, new: NewCheckpoint, now: float, key_id: str | None = None
) -> None:
    """See `Checkpoints.put`; within the caller's transaction. key_id: for whose quotas it counts."""
    _require_run(conn, tenant_id, new.run_id)
    named = _named(new.run_id, new.kind, new.name)
    earlier = conn.execute(_EARLIER, named).first()
    if earlier is not None:
        conn.execute(_DELETE, named)
        bury(conn, [earlier.blob] if earlier.blob != new.blob else [], now)
        end_span(conn, named, now, now)
    open_span(conn, tenant_id, new, now)
    conn.execute(
        _INSERT,
        {
            "run_id": new.run_id,
            "kind": new.kind.value,
            "name": new.name,
            "tenant_id": tenant_id,
            "blob": new.blob,
            "size_bytes": new.size_bytes,
            "sha256": new.sha256,
            "created_at": now,
            "expires_at": new.expires_at,
            "user_metadata": dict(new.user_metadata),
            "has_optimizer": new.has_optimizer,
            "key_id": key_id,
        },
    )


def is_taken(conn: Connection, new: NewCheckpoint, now: float) -> bool:
    """Whether another file has its name; within the caller's transaction."""
    found = conn.execute(_TAKEN, {**_named(new.run_id, new.kind, new.name), "now": now}).scalar()
    return found is not None and found != new.blob


def about(row: CheckpointRow) -> dict[str, str]:
    """A checkpoint as the audit log speaks of it."""
    return {"model_id": row.run_id, "tinker_path": row.path}


def _require_run(conn: Connection, tenant_id: TenantId, run_id: RunId) -> None:
    if conn.execute(_RUN, {"run_id": run_id, "tenant_id": tenant_id}).first() is None:
        raise NotFoundError(f"no training run {run_id}")


def _get(
    conn: Connection, tenant_id: TenantId, run_id: RunId, kind: CheckpointKind, name: str, now: float | None
) -> CheckpointRow:
    return _found(conn.execute(_GET, _key(tenant_id, run_id, kind, name, now)).first(), run_id, kind, name)


def _found(row: Sequence[Any] | None, run_id: RunId, kind: CheckpointKind, name: str) -> CheckpointRow:
    if row is None:
        raise NotFoundError(f"no checkpoint tinker://{run_id}/{kind}/{name}")
    return _to_checkpoint(row)


def _key(tenant_id: TenantId, run_id: RunId, kind: CheckpointKind, name: str, now: float | None) -> dict[str, Any]:
    return {**_named(run_id, kind, name), "tenant_id": tenant_id, "now": _clock(now)}


def _named(run_id: RunId, kind: CheckpointKind, name: str) -> dict[str, Any]:
    return {"of_run": run_id, "of_kind": kind.value, "of_name": name}


def _clock(now: float | None) -> float:
    return time.time() if now is None else now


def _to_checkpoint(row: Sequence[Any]) -> CheckpointRow:
    (tenant_id, run_id, kind, name, blob, size_bytes, sha256, created_at, expires_at, user_metadata, has_optimizer,
     is_public, spec) = row  # fmt: skip
    return CheckpointRow(
        tenant_id=tenant_id,
        run_id=run_id,
        kind=CheckpointKind(kind),
        name=name,
        blob=blob,
        size_bytes=size_bytes,
        sha256=sha256,
        created_at=created_at,
        expires_at=expires_at,
        user_metadata=user_metadata,
        has_optimizer=has_optimizer,
        is_public=is_public,
        spec=to_spec(spec),
    )
