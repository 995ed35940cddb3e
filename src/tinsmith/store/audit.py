"""The audit log: who did what to what, written in the transaction of the act itself.

An event is named `<resource>_<action>`; the resource decides which of the wire's kinds it is listed under. Details are
short texts and never hold a secret. Entries are never changed, and go by their age alone, if at all.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, and_, bindparam, delete, insert, or_, select

from tinsmith.crashpoints import crash_point
from tinsmith.store.database import Database
from tinsmith.store.rows import Principal
from tinsmith.store.schema import audit
from tinsmith.store.usage_rows import AuditPage, AuditRow
from tinsmith.types import TenantId

RESOURCES = ("checkpoint", "project", "team", "organization")
SERVER = "server"  # the actor of what the server did by itself
LIST_AT_MOST = 10_000

_INSERT = insert(audit).inline()
_OLD = select(audit.c.num).where(audit.c.at < bindparam("before")).order_by(audit.c.at).limit(bindparam("limit"))
_TRIM = delete(audit).where(audit.c.num.in_(bindparam("nums", expanding=True)))
_LIST = (
    select(audit.c.at, audit.c.event, audit.c.tenant_id, audit.c.details, audit.c.num)
    .where(
        audit.c.at >= bindparam("start"),
        audit.c.at < bindparam("end"),
        or_(bindparam("of_tenant").is_(None), audit.c.tenant_id == bindparam("of_tenant")),
        or_(bindparam("of_resource").is_(None), audit.c.resource == bindparam("of_resource")),
        or_(
            audit.c.at < bindparam("before_at"),
            and_(audit.c.at == bindparam("before_at"), audit.c.num < bindparam("before_num")),
        ),
    )
    .order_by(audit.c.at.desc(), audit.c.num.desc())
    .limit(bindparam("most"))
)


class Audit:
    def __init__(self, database: Database) -> None:
        self._database = database

    def list(
        self,
        tenant_id: TenantId | None,
        resource: str | None,
        start: float,
        end: float,
        *,
        before: tuple[float, int] | None = None,
        limit: int = LIST_AT_MOST,
    ) -> AuditPage:
        """What happened from `start` until before `end`, oldest first; the newest `limit` if there are more.

        Args:
            tenant_id: None: of all tenants, which is for administrators alone.
            resource: one of `RESOURCES`; None: all.
            before: `AuditPage.before` of the page that this one comes before.
        """
        before_at, before_num = before or (end, 0)
        values = {
            "of_tenant": tenant_id,
            "of_resource": resource,
            "start": start,
            "end": end,
            "before_at": before_at,
            "before_num": before_num,
            "most": limit + 1,
        }
        with self._database.read() as conn:
            found = conn.execute(_LIST, values).all()
        rows = [AuditRow(at, event, of_tenant, details) for at, event, of_tenant, details, _ in found[:limit]]
        oldest = found[limit - 1] if len(found) > limit else None
        return AuditPage(rows[::-1], None if oldest is None else (oldest[0], oldest[4]))

    def trim(self, before: float, limit: int) -> int:
        """Drop entries older than `before` (unix seconds), the oldest first; how many. `limit`: there may be more."""
        with self._database.read() as conn:
            if conn.execute(_OLD, {"before": before, "limit": 1}).first() is None:
                return 0
        with self._database.write() as conn:
            nums = list(conn.execute(_OLD, {"before": before, "limit": limit}).scalars())
            conn.execute(_TRIM, {"nums": nums})
            crash_point("audit.before_trim_commit")
        return len(nums)


def note(
    conn: Connection, event: str, tenant_id: TenantId, by: Principal | None, details: Mapping[str, str], now: float
) -> None:
    """Record an act on something of `tenant_id`, within the caller's transaction. `by` None: the server itself.

    Raises:
        ValueError: the event's name doesn't begin with one of `RESOURCES`.
    """
    resource = event.partition("_")[0]
    if resource not in RESOURCES:
        raise ValueError(f"an audited event is one of {RESOURCES}, then its action, not {event!r}")
    actor = {"actor": SERVER} if by is None else {"actor": by.tenant_name, "actor_key_id": by.key_id}
    row = {
        "tenant_id": tenant_id,
        "at": now,
        "resource": resource,
        "event": event,
        "details": {**actor, **details},
    }
    conn.execute(_INSERT, row)
