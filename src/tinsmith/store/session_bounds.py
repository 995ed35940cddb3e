"""How many sessions a tenant may have: so many that live at one time, and ten times as many that are opened in an hour.

Within the transaction that makes one, so no number of API processes and no restart lets more through. What stays true:
with what `Sessions.drop_empty` takes away an hour after its end, one tenant's sessions are bounded rows; keys that can
only look at things hold an eighth of the tenant's sessions at most, and keep nobody who trains from opening one.
"""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, func, literal_column, select

from tinsmith.errors import CapacityError
from tinsmith.scopes import Scope
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import Principal
from tinsmith.store.schema import keys, sessions
from tinsmith.types import TenantId

HOUR_S = 3600.0
OPENED_AN_HOUR = 10  # times the bound
READERS_SHARE = 8  # one of so many parts

_LIVE = select(func.count()).where(sessions.c.finished_at.is_(None), sessions.c.tenant_id == bindparam("tenant_id"))
_NUM_LIVE = Prepared(_LIVE)
_NUM_READERS = Prepared(
    _LIVE.select_from(sessions)
    .join(keys, keys.c.key_id == sessions.c.key_id)
    .where(keys.c.scope == literal_column(f"'{Scope.READ.value}'"))
)
_NUM_LATELY = Prepared(
    select(func.count()).where(
        sessions.c.tenant_id == bindparam("tenant_id"), sessions.c.created_at > bindparam("since")
    )
)


def require_room(conn: Connection, tenant_id: TenantId, by: Principal | None, most: int, now: float) -> None:
    """`by`: whose key opens one more. most: that may live at one time.

    Raises:
        CapacityError: as many live already, or too many were opened within the hour.
    """
    of_tenant = {"tenant_id": tenant_id}
    if _NUM_LIVE.first(conn, of_tenant)[0] >= most:
        raise CapacityError(
            f"{most} sessions of yours are open already, as many as may be (--max-sessions): end some of them; one "
            "whose client has gone ends by itself after --session-timeout-s"
        )
    readers = max(1, most // READERS_SHARE)
    if by is not None and by.scope is Scope.READ and _NUM_READERS.first(conn, of_tenant)[0] >= readers:
        raise CapacityError(
            f"{readers} sessions of keys of scope read are open already, as many as may be (an eighth of "
            "--max-sessions): end some of them; one whose client has gone ends by itself after --session-timeout-s"
        )
    require_not_too_many(conn, tenant_id, most, now)


def require_not_too_many(conn: Connection, tenant_id: TenantId, most: int, now: float) -> None:
    """Raises: CapacityError: too many sessions were opened within the hour, those among them that have ended."""
    opened = OPENED_AN_HOUR * most
    if _NUM_LATELY.first(conn, {"tenant_id": tenant_id, "since": now - HOUR_S})[0] >= opened:
        raise CapacityError(
            f"{opened} sessions of yours were opened within an hour, as many as may be (ten times --max-sessions): "
            "keep one ServiceClient for many requests"
        )
