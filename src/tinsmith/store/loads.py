"""What of a tenant waits in the queue, for the bounds at the door. Reads alone."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import bindparam, exists, func, or_, select

from tinsmith.store.database import Database
from tinsmith.store.fences import HAS_RUNNABLE, IS_QUEUED
from tinsmith.store.prepared import Prepared
from tinsmith.store.schema import ops, runs
from tinsmith.types import RunId, TenantId

_OF_TENANT = select(func.count(), func.coalesce(func.sum(ops.c.payload_bytes), 0)).where(
    IS_QUEUED, ops.c.tenant_id == bindparam("tenant_id")
)
_SAMPLES = Prepared(_OF_TENANT.where(ops.c.kind == "sample"))
_TRAINING = Prepared(_OF_TENANT.where(ops.c.kind != "sample"))
_READY = Prepared(
    select(ops.c.tenant_id, func.count())
    .select_from(ops.outerjoin(runs, runs.c.run_id == ops.c.run_id))
    .where(IS_QUEUED, or_(ops.c.run_id.is_(None), ops.c.seq_id <= runs.c.head_seq))
    .group_by(ops.c.tenant_id)
)
_HAS_COME = exists().where(ops.c.run_id == runs.c.run_id, ops.c.seq_id == bindparam("seq_id")).correlate(runs)
_STANDING = Prepared(
    select(runs.c.head_seq, runs.c.max_seq, HAS_RUNNABLE, _HAS_COME).where(runs.c.run_id == bindparam("run_id"))
)


class Load(NamedTuple):
    """Requests, and the bytes of what they ask."""

    requests: int
    num_bytes: int

    def plus(self, other: Load) -> Load:
        return Load(self.requests + other.requests, self.num_bytes + other.num_bytes)

    def less(self, other: Load) -> Load:
        return Load(self.requests - other.requests, self.num_bytes - other.num_bytes)


class Loads:
    def __init__(self, database: Database) -> None:
        self._database = database

    def samples(self, tenant_id: TenantId) -> Load:
        """Sample requests of the tenant that no worker has taken yet."""
        with self._database.read() as conn:
            return Load(*_SAMPLES.all(conn, {"tenant_id": tenant_id})[0])

    def training(self, tenant_id: TenantId) -> Load:
        """Its requests on runs that no worker has taken yet, those to make runs among them."""
        with self._database.read() as conn:
            return Load(*_TRAINING.all(conn, {"tenant_id": tenant_id})[0])

    def ready(self) -> dict[TenantId, int]:
        """How many requests of each tenant wait for a worker and not for one of their run that has not come."""
        with self._database.read() as conn:
            return dict(_READY.all(conn, {}))

    def is_awaited(self, run_id: RunId, seq_id: int) -> bool:
        """Whether room for the request `seq_id` adds nothing, or nothing of the run can begin without it: it has come
        before, or is the one that all others of the run that wait are waiting for."""
        with self._database.read() as conn:
            row = _STANDING.first(conn, {"run_id": run_id, "seq_id": seq_id})
        if row is None:
            return False
        head_seq, max_seq, has_runnable, has_come = row
        return bool(has_come or (not has_runnable and seq_id == head_seq + 1 and max_seq > seq_id))
