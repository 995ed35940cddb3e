"""Who is asking: a key, or a token that stands for one, from `X-API-Key` or `Authorization: Bearer` to a principal.

Every route under a guard is closed; there are no exceptions inside. Keys and tokens that were good are remembered for
`TTL_S`, so those of a revoked key work for at most that long, and a token that ends for that much longer.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard
from structlog.contextvars import bind_contextvars

from tinsmith.api.places import CALLER
from tinsmith.api.tokens import PREFIX
from tinsmith.errors import AuthError, ForbiddenError
from tinsmith.store.rows import Principal

TTL_S = 1.0
MAX_REMEMBERED = 10_000

Call = Request[Principal, str, State]
Connection = ASGIConnection[BaseRouteHandler, Principal, str, State]


class KeyCache:
    """Remembers good keys by their hash, never by themselves."""

    def __init__(self, authenticate: Callable[[str], Coroutine[Any, Any, Principal | None]]) -> None:
        self._authenticate = authenticate
        self._known: dict[bytes, tuple[Principal, float]] = {}
        self._asked: dict[bytes, asyncio.Future[Principal | None]] = {}

    def known(self, secret: str) -> Principal | None:
        """Whose key this is, if it was good a moment ago."""
        known = self._known.get(_digest(secret))
        return known[0] if known is not None and known[1] > time.monotonic() else None

    async def principal(self, secret: str) -> Principal:
        """Raises: AuthError: no such key, or it was revoked."""
        now = time.monotonic()
        digest = _digest(secret)
        known = self._known.get(digest)
        if known is not None and known[1] > now:
            return known[0]
        principal = await self._ask_once(digest, secret)
        if principal is None:
            self._known.pop(digest, None)
            raise AuthError("this key is unknown or was revoked: make one with `tinsmith keys create`")
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        self._known[digest] = (principal, now + TTL_S)
        return principal

    async def _ask_once(self, digest: bytes, secret: str) -> Principal | None:
        """Many requests with one key at the same time are one question."""
        asked = self._asked.get(digest)
        if asked is None:
            asked = self._asked[digest] = asyncio.ensure_future(self._authenticate(secret))
            asked.add_done_callback(lambda _: self._asked.pop(digest, None))
        return await asyncio.shield(asked)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()


def key_guard(keys: KeyCache) -> Guard:
    """A guard that puts the caller's principal into the request, or refuses it."""

    async def require_key(connection: Connection, handler: BaseRouteHandler) -> None:
        principal = await keys.principal(secret_of(connection))
        connection.scope["user"] = principal
        CALLER.set(principal.tenant_id)
        bind_contextvars(tenant=principal.tenant_name, tenant_id=principal.tenant_id)

    return require_key


def admin_guard(connection: Connection, handler: BaseRouteHandler) -> None:
    """Runs after the key guard."""
    if not connection.user.is_admin:
        raise ForbiddenError("this needs an admin key")


def key_itself_guard(connection: Connection, handler: BaseRouteHandler) -> None:
    """What lasts isn't for a token that ends soon. Runs after the key guard."""
    if secret_of(connection).startswith(PREFIX):
        raise ForbiddenError(
            "this needs the key itself, not a token (JWT) that was made from it: send the key as X-API-Key"
        )


def secret_of(connection: ASGIConnection[Any, Principal, str, State]) -> str:
    """The key or token that came with a request.

    Raises:
        AuthError: none did.
    """
    secret = connection.headers.get("x-api-key", "")
    if secret:
        return secret
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    raise AuthError("no key: send one as X-API-Key or Authorization: Bearer; `tinsmith keys create` makes one")
