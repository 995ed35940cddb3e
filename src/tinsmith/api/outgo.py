"""What answers may cost that nobody reads: bytes held at one time, over all tenants and for each.

Every answer's `send` runs through here, whichever route it is for. A large one goes out in pieces, each after the
client has taken most of those before; until the last is on its way, it counts as held. What is read from a stored file
goes out piece by piece too and is never held whole; what such an answer keeps open is closed with it, however it ends.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

from litestar import Request
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPResponseBodyEvent, Message, Receive, Scope, Send

from tinsmith.api.dialects import HANDLERS_BY_PATH
from tinsmith.errors import CapacityError, TinsmithError
from tinsmith.types import TenantId

PIECE_BYTES = 64 << 10
TENANT_BYTES = 64 << 20
TOTAL_BYTES = 512 << 20


class Unread:
    """Bytes of answers under way. For the event loop's own thread."""

    def __init__(self, max_bytes: int = TOTAL_BYTES, max_tenant_bytes: int = TENANT_BYTES) -> None:
        self._max_bytes, self._max_tenant_bytes = max_bytes, max_tenant_bytes
        self._held: Counter[TenantId | None] = Counter()

    @property
    def num_bytes(self) -> int:
        return self._held.total()

    def take(self, tenant_id: TenantId | None, num_bytes: int) -> None:
        """Hold an answer; a tenant's only one may have any size.

        Raises:
            CapacityError: too much is held, by this tenant or by all; nothing was taken.
        """
        held = self._held[tenant_id]
        if held and held + num_bytes > self._max_tenant_bytes:
            raise CapacityError(
                f"answers to you that you have not read yet hold {held} bytes, and this one {num_bytes}; at most "
                f"{self._max_tenant_bytes} are held: read those, then send this request again"
            )
        if held and self.num_bytes + num_bytes > self._max_bytes:
            raise CapacityError("too many answers wait to be read by their clients at the moment: send it again")
        self.add(tenant_id, num_bytes)

    def add(self, tenant_id: TenantId | None, num_bytes: int) -> None:
        """Hold a piece of an answer that has begun."""
        self._held[tenant_id] += num_bytes

    def give_back(self, tenant_id: TenantId | None, num_bytes: int) -> None:
        self._held[tenant_id] -= num_bytes
        if not self._held[tenant_id]:
            del self._held[tenant_id]


def with_outgo(app: ASGIApp, unread: Unread) -> ASGIApp:
    """Bound what goes out; an answer for which there is no room is replaced by a refusal."""

    async def outgo(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        start: Message | None = None
        is_refused = False

        async def send_bounded(message: Message) -> None:
            nonlocal start, is_refused
            if is_refused:
                return
            if message["type"] == "http.response.start":
                start = message if _stated_bytes(message) > PIECE_BYTES else None  # kept until there is room for it
                if start is None:
                    await send(message)
                return
            if message["type"] != "http.response.body":
                await send(message)
                return
            body = message["body"]
            if len(body) <= PIECE_BYTES and start is None:
                await send(message)
                return
            principal = scope.get("user")
            tenant_id = None if principal is None else principal.tenant_id
            if start is None:
                unread.add(tenant_id, len(body))
            else:
                try:
                    unread.take(tenant_id, len(body))
                except CapacityError as error:
                    is_refused = True
                    request: Request[Any, Any, Any] = Request(scope)
                    refusal = HANDLERS_BY_PATH[TinsmithError](request, error).to_asgi_response(None, request)
                    await refusal(scope, receive, send)
                    return
            try:
                if start is not None:
                    await send(start)
                    start = None
                for at in range(0, len(body), PIECE_BYTES):
                    await send(_piece(body[at : at + PIECE_BYTES], more=True))
                if not message.get("more_body", False):
                    await send(_piece(b"", more=False))
            finally:
                unread.give_back(tenant_id, len(body))

        with ExitStack() as closing:
            scope["state"]["closing"] = closing
            await app(scope, receive, send_bounded)

    return outgo


def closing_with(scope: Any) -> ExitStack:
    """What is put on it is done once the request has been answered, or its client has gone."""
    closing: ExitStack = scope["state"]["closing"]
    return closing


def _piece(body: bytes, *, more: bool) -> HTTPResponseBodyEvent:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _stated_bytes(start: Message) -> int:
    headers: Any = start.get("headers", ())
    return next((int(value) for name, value in headers if name.lower() == b"content-length"), 0)
