"""Which sample requests have recorded routes."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, select

from tinsmith.errors import NotFoundError
from tinsmith.store.database import Database
from tinsmith.store.prepared import Prepared
from tinsmith.store.schema import ops
from tinsmith.types import BlobKey, OpId, OpKind, TenantId

_FIND = Prepared(
    select(ops.c.routes_blob, ops.c.is_expired).where(
        ops.c.op_id == bindparam("id"),
        ops.c.tenant_id == bindparam("tenant"),
        ops.c.kind == OpKind.SAMPLE.value,
    )
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """blob None: the request recorded none, or they have expired."""

    blob: BlobKey | None
    is_expired: bool


class RecordedRoutes:
    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, tenant_id: TenantId, op_id: OpId) -> Recorded:
        """Raises: NotFoundError: no such sample request of this tenant."""
        with self._database.read() as conn:
            row = _FIND.first(conn, {"id": op_id, "tenant": tenant_id})
        if row is None:
            raise NotFoundError(f"no sample request {op_id}")
        return Recorded(*row)
