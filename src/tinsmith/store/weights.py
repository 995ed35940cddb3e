"""How much of the engine each tenant gets beside others: 1, unless an administrator has set another weight."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sqlalchemy import bindparam, select, update

from tinsmith.errors import NotFoundError, UserError
from tinsmith.store.audit import note
from tinsmith.store.database import Database
from tinsmith.store.prepared import readable
from tinsmith.store.rows import Principal
from tinsmith.store.schema import tenants
from tinsmith.types import TenantId

LEAST, MOST = 0.01, 100.0

_SET = select(tenants.c.tenant_id, tenants.c.weight).where(tenants.c.weight != 1.0)
_LIST = select(tenants.c.name, tenants.c.weight).order_by(tenants.c.name)
_FIND = select(tenants.c.tenant_id).where(tenants.c.name == bindparam("name"))
_UPDATE = update(tenants).where(tenants.c.tenant_id == bindparam("id")).values(weight=bindparam("new_weight"))


def _is_weight(found: object) -> bool:
    """A row that was changed on the disk may hold anything."""
    return isinstance(found, float) and LEAST <= found <= MOST


class Weights:
    def __init__(self, database: Database) -> None:
        self._database = database

    def others(self) -> Mapping[TenantId, float]:
        """Of the tenants whose weight isn't 1."""
        with self._database.read() as conn, readable(conn):
            return {TenantId(tenant_id): weight for tenant_id, weight in conn.execute(_SET) if _is_weight(weight)}

    def all(self) -> Mapping[str, float]:
        """Of every tenant, by name."""
        with self._database.read() as conn:
            return {str(name): float(weight) for name, weight in conn.execute(_LIST)}

    def set(self, name: str, weight: float, now: float | None = None, *, by: Principal | None = None) -> None:
        """From now on the tenant has this weight. `by` stands in the audit log.

        Raises:
            UserError: not a weight.
            NotFoundError: no such tenant.
        """
        if not LEAST <= weight <= MOST:
            raise UserError(f"a weight lies between {LEAST:g} and {MOST:g}, not {weight:g}")
        with self._database.write() as conn:
            tenant_id = conn.execute(_FIND, {"name": name}).scalar()
            if tenant_id is None:
                raise NotFoundError(f"no tenant is named {name!r}")
            conn.execute(_UPDATE, {"id": tenant_id, "new_weight": float(weight)})
            at = time.time() if now is None else now
            note(
                conn,
                "organization_weight_set",
                TenantId(tenant_id),
                by,
                {"organization": name, "weight": f"{weight:g}"},
                at,
            )
