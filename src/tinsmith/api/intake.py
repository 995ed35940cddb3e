"""What bodies may cost: bytes held at one time, over all requests and for each tenant; and the time to come in.

Every request's `receive` runs through here, whichever route it is for, so no route can forget it. Bytes count as they
come in and until the request is answered; what a body inflates to is counted by `body.inflate` beside what was sent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import ExitStack
from typing import Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from tinsmith.api.pressure import COMPATIBLE, FILLING, Pressure
from tinsmith.errors import CapacityError, RequestTimeoutError, TooLargeError, UserError
from tinsmith.types import TenantId

IDLE_S = 30.0  # between two pieces of a body
WHOLE_S = 900.0  # from the first piece to the last
TOTAL_BODIES = 4  # the largest body, so many times: over all tenants


class Budget:
    """Bytes of bodies held at one time. Any method may be called from any thread."""

    def __init__(self, max_bytes: int, max_tenant_bytes: int) -> None:
        self._max_bytes, self._max_tenant_bytes = max_bytes, max_tenant_bytes
        self._lock = threading.Lock()
        self._held: dict[TenantId | None, int] = {}

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(self._held.values())

    def take(self, tenant_id: TenantId | None, num_bytes: int, own_bytes: int) -> None:
        """Hold more bytes for a request that holds `own_bytes` already.

        A tenant's only request is bounded by what its route takes, so that the largest body always fits.

        Raises:
            CapacityError: too much is held, by this tenant or by all; nothing was taken.
            TooLargeError: the request alone would hold more than all together may.
        """
        if own_bytes + num_bytes > self._max_bytes:
            raise TooLargeError(
                f"taken in, this request would hold {own_bytes + num_bytes} bytes, and all requests together may hold "
                f"{self._max_bytes}: send fewer datums or tokens a request"
            )
        with self._lock:
            tenant_bytes = self._held.get(tenant_id, 0)
            if tenant_bytes > own_bytes and tenant_bytes + num_bytes > self._max_tenant_bytes:
                raise CapacityError(
                    f"your requests under way hold {tenant_bytes} bytes, at most {self._max_tenant_bytes} are taken at "
                    "one time: send this one again when others have been answered"
                )
            if sum(self._held.values()) + num_bytes > self._max_bytes:
                raise CapacityError("the server is taking in too many large requests at the moment: send it again")
            self._held[tenant_id] = tenant_bytes + num_bytes

    def give_back(self, tenant_id: TenantId | None, num_bytes: int) -> None:
        with self._lock:
            left = self._held.pop(tenant_id, 0) - num_bytes
            if left > 0:
                self._held[tenant_id] = left


class Hold:
    """What one request holds of the budget. Its tenant is known once its key was checked, before its body is read."""

    def __init__(self, budget: Budget, scope: Scope) -> None:
        self._budget, self._scope = budget, scope
        self._tenant_id: TenantId | None = None
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises: CapacityError: there is no room now."""
        if not self._num_bytes:
            principal = self._scope.get("user")
            self._tenant_id = None if principal is None else principal.tenant_id
        self._budget.take(self._tenant_id, num_bytes, self._num_bytes)
        self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._budget.give_back(self._tenant_id, num_bytes)
        self._num_bytes -= num_bytes

    def close(self) -> None:
        self.give_back(self._num_bytes)


def with_intake(app: ASGIApp, budget: Budget, pressure: Pressure) -> ASGIApp:
    """Bound what comes in: `receive` raises CapacityError, RequestTimeoutError, UserError if the client goes away.

    Requests that fill the queue are refused under pressure, before any of their body is read.
    """

    fills = FILLING | COMPATIBLE

    async def intake(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        hold = Hold(budget, scope)
        scope["state"]["hold"] = hold
        last_at = time.monotonic() + WHOLE_S
        is_whole = is_begun = False
        passing = ExitStack()

        async def receive_bounded() -> Any:
            nonlocal is_whole, is_begun
            if is_whole:
                return await receive()
            if not is_begun and scope["path"] in fills and scope.get("user") is not None:
                passing.enter_context(pressure.under_way(scope["user"].tenant_id))
            is_begun = True
            try:
                async with asyncio.timeout(max(0.0, min(IDLE_S, last_at - time.monotonic()))):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeoutError(
                    f"the request's body did not come in: nothing for {IDLE_S:g} s, or not whole after {WHOLE_S:g} s; "
                    "send it again"
                ) from None
            if message["type"] != "http.request":
                raise UserError("the connection was closed before the request's body was whole")
            is_whole = not message.get("more_body", False)
            hold.take(len(message.get("body", b"")))
            return message

        try:
            await app(scope, receive_bounded, send)
        finally:
            passing.close()
            hold.close()

    return intake


def hold_of(scope: Any) -> Hold:
    """What a request holds of the budget."""
    hold: Hold = scope["state"]["hold"]
    return hold
