"""What an operator looks at: how much waits and for whom, how many runs and files there are. Reads alone.

Of all tenants: callers show it to administrators only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import bindparam, func, select

from tinsmith.store.database import Database
from tinsmith.store.fences import IS_QUEUED, IS_RUNNING
from tinsmith.store.prepared import readable
from tinsmith.store.schema import checkpoints, ops, runs, sessions, tenants
from tinsmith.types import RunId, TenantId

_QUEUED = (
    select(tenants.c.name, ops.c.kind, func.count(), func.min(ops.c.created_at))
    .join(tenants, tenants.c.tenant_id == ops.c.tenant_id)
    .where(IS_QUEUED)
    .group_by(tenants.c.name, ops.c.kind)
)
_RUNNING = select(ops.c.kind, func.count().label("number")).where(IS_RUNNING).group_by(ops.c.kind)
_RUNS = select(runs.c.status, func.count().label("number")).group_by(runs.c.status)
_SNAPSHOTS = select(func.count(), func.coalesce(func.sum(runs.c.snapshot_bytes), 0)).where(
    runs.c.snapshot_blob.is_not(None)
)
_CHECKPOINTS = select(checkpoints.c.kind, func.count(), func.sum(checkpoints.c.size_bytes)).group_by(checkpoints.c.kind)
_SESSIONS = select(func.count()).where(sessions.c.finished_at.is_(None))
_NAME = select(tenants.c.name).where(tenants.c.tenant_id == bindparam("tenant_id"))
_WAITING = select(func.count()).where(ops.c.run_id == runs.c.run_id, IS_QUEUED).scalar_subquery()
_LATEST = (
    select(
        runs.c.run_id, tenants.c.name, runs.c.base_model, runs.c.status, runs.c.head_seq, runs.c.snapshot_seq,
        runs.c.last_request_at, _WAITING,
    )
    .join(tenants, tenants.c.tenant_id == runs.c.tenant_id)
    .where(runs.c.gone_at.is_(None))
    .order_by(runs.c.last_request_at.desc())
    .limit(bindparam("limit"))
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Waiting:
    """Requests of one kind of a tenant that wait. oldest_at: when the first of them came, unix seconds."""

    tenant: str
    kind: str
    count: int
    oldest_at: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One view of the database. Counts by what they are of; bytes beside them."""

    waiting: list[Waiting]
    running: dict[str, int]
    runs: dict[str, int]
    num_snapshots: int
    snapshot_bytes: int
    checkpoints: dict[str, tuple[int, int]]
    num_sessions: int


@dataclass(frozen=True, slots=True)
class RunFigures:
    """A run at a glance. num_waiting: its queued requests; head_seq, snapshot_seq: see `RunRow`."""

    run_id: RunId
    tenant: str
    base_model: str
    status: str
    head_seq: int
    snapshot_seq: int
    last_request_at: float
    num_waiting: int


class Overview:
    def __init__(self, database: Database) -> None:
        self._database = database

    def figures(self) -> Figures:
        with self._database.read() as conn, readable(conn):
            num_snapshots, snapshot_bytes = conn.execute(_SNAPSHOTS).one()
            return Figures(
                waiting=[Waiting(*row) for row in conn.execute(_QUEUED)],
                running={row.kind: row.number for row in conn.execute(_RUNNING)},
                runs={row.status: row.number for row in conn.execute(_RUNS)},
                num_snapshots=num_snapshots,
                snapshot_bytes=snapshot_bytes,
                checkpoints={kind: (count, size) for kind, count, size in conn.execute(_CHECKPOINTS)},
                num_sessions=conn.execute(_SESSIONS).scalar_one(),
            )

    def latest_runs(self, limit: int) -> list[RunFigures]:
        """Those that were asked for something last, newest first."""
        with self._database.read() as conn, readable(conn):
            return [RunFigures(*row) for row in conn.execute(_LATEST, {"limit": limit})]

    def tenant_names(self, tenant_ids: Iterable[TenantId]) -> dict[TenantId, str]:
        return {tenant_id: self.tenant_name(tenant_id) for tenant_id in tenant_ids}

    def tenant_name(self, tenant_id: TenantId) -> str:
        """Empty if there's no such tenant."""
        with self._database.read() as conn, readable(conn):
            return conn.execute(_NAME, {"tenant_id": tenant_id}).scalar() or ""
