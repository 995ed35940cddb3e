"""How often a tenant may do what costs a row for good, or tries out secrets: so many at once, and so many a minute.

What is bounded: acts that stand in the audit log and can be repeated at will (links and tokens for checkpoints,
publishing, lifetimes, projects, copies), by the table `ACTS`; and keys of others that are shown as a
`weights_access_token`, which is a way to try keys out. Deleting is not: there has to be something to delete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard

from tinsmith.api.guesses import Guesses
from tinsmith.errors import CapacityError, GuessingError
from tinsmith.store.rows import Principal
from tinsmith.types import TenantId

ACTS_PER_MINUTE = 300
ACTS = frozenset(
    {
        "create_access_token", "archive", "external_weights_urls", "publish", "unpublish", "set_checkpoint_ttl",
        "assign_project", "copy_weights",
    }
)  # fmt: skip


class Rate:
    """May be called from any thread."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets = Guesses(per_minute)
        self._lock = threading.Lock()

    def take(self, tenant_id: TenantId) -> int:
        """One of them; or 0 of them, and the whole seconds until there is one."""
        with self._lock:
            wait_s = self._buckets.wait_s(tenant_id)
            if not wait_s:
                self._buckets.count(tenant_id)
            return wait_s

    def give_back(self, tenant_id: TenantId) -> None:
        """What was taken doesn't count."""
        with self._lock:
            self._buckets.forgive(tenant_id)


def act_guard(acts: Rate) -> Guard:
    """Runs after the key guard."""

    def require_room(
        connection: ASGIConnection[BaseRouteHandler, Principal, str, State], handler: BaseRouteHandler
    ) -> None:
        if handler.fn.__name__ in ACTS:
            wait_s = acts.take(connection.user.tenant_id)
            if wait_s:
                raise CapacityError(
                    f"{acts.per_minute} links, tokens and changes of checkpoints of yours a minute are as many as may "
                    f"be: try again in {wait_s} s"
                )

    return require_room


def foreign_key(shown: Rate, tenant_id: TenantId, look_up: Callable[[], Principal | None]) -> Principal | None:
    """Whose key it is that the tenant shows.

    Raises:
        GuessingError: the tenant has shown too many that nobody has.
    """
    wait_s = shown.take(tenant_id)
    if wait_s:
        raise GuessingError(f"too many unknown keys were shown as weights_access_token: try again in {wait_s} s")
    found = look_up()
    if found is not None:
        shown.give_back(tenant_id)
    return found
