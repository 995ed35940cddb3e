"""Who is asking: a key, or a token that stands for one, from `X-API-Key` or `Authorization: Bearer` to a principal.

Every route under a guard is closed; there are no exceptions inside. Keys and tokens that were good are remembered for
`TTL_S`; a key that is revoked is forgotten at once, with the tokens that stand for it and the connections that use it,
and one that expires isn't remembered beyond its end.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard
from structlog.contextvars import bind_contextvars

from tinsmith.api.guesses import Guesses, address_of
from tinsmith.api.places import CALLER
from tinsmith.api.tokens import PREFIX as TOKEN
from tinsmith.api.underway import Underway
from tinsmith.errors import AuthError, ForbiddenError, GuessingError
from tinsmith.store.rows import Principal

TTL_S = 1.0
RENEW_S = 0.4  # before that is over: a look may take so long where much is asked
GOOD_S = 3600.0  # for so long a good key is no guess
MAX_REMEMBERED = 10_000

Call = Request[Principal, str, State]
Connection = ASGIConnection[BaseRouteHandler, Principal, str, State]


class KeyCache:
    """Remembers good keys by their hash, never by themselves.

    Args:
        guesses: what each address may try; None: there's no bound.
    """

    def __init__(
        self,
        authenticate: Callable[[str], Coroutine[Any, Any, Principal | None]],
        guesses: Guesses | None = None,
    ) -> None:
        self._authenticate = authenticate
        self._guesses = guesses
        self._known: dict[bytes, tuple[Principal, float]] = {}
        self._asked: dict[bytes, asyncio.Future[Principal | None]] = {}
        self._renewing: dict[bytes, asyncio.Future[Principal]] = {}
        self._were_good: OrderedDict[bytes, float] = OrderedDict()
        self._num_forgotten = 0

    def known(self, secret: str) -> Principal | None:
        """Whose key this is, if it was good a moment ago. One that is used all the time is looked up again before that
        moment is over, so that its requests never have to wait for it."""
        digest = _digest(secret)
        principal, until = self._known.get(digest, (None, 0.0))
        left_s = until - time.monotonic()
        if principal is None or left_s <= 0 or _has_expired(principal):
            return None
        if left_s < RENEW_S and digest not in self._renewing:
            self._renewing[digest] = asyncio.ensure_future(self._look_up(digest, secret, ""))
            self._renewing[digest].add_done_callback(partial(self._renewed, digest))
        return principal

    def _renewed(self, digest: bytes, asked: asyncio.Future[Principal]) -> None:
        """What went wrong is told to who asks next."""
        del self._renewing[digest]
        if not asked.cancelled():
            asked.exception()

    def was_good(self, secret: str) -> bool:
        """Whether it was within the hour."""
        return time.monotonic() - self._were_good.get(_digest(secret), -GOOD_S) < GOOD_S

    async def again(self, secret: str) -> Principal | None:
        """Whose key this is that was good within the hour; None: it isn't good any more."""
        try:
            return await self.principal(secret)
        except AuthError:
            return None

    async def principal(self, secret: str, address: str = "") -> Principal:
        """address: where it comes from.

        Raises:
            AuthError: no such key, or it was revoked or has expired.
            GuessingError: too many such keys came from there.
        """
        known = self.known(secret)
        if known is not None:
            return known
        return await self._look_up(_digest(secret), secret, address)

    async def _look_up(self, digest: bytes, secret: str, address: str) -> Principal:
        """Raises: as `principal`."""
        num_forgotten = -1
        while num_forgotten != self._num_forgotten:  # else this may be the answer of before a revocation
            num_forgotten = self._num_forgotten
            principal = await self._ask_once(digest, secret, address)
        if principal is None:
            self._known.pop(digest, None)
            raise AuthError("this key is unknown, was revoked or has expired: make one with `tinsmith keys create`")
        now = time.monotonic()
        self._were_good.pop(digest, None)
        self._were_good[digest] = now
        if len(self._were_good) > MAX_REMEMBERED:
            self._were_good.popitem(last=False)
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        self._known[digest] = (principal, now + TTL_S)
        return principal

    def forget(self, key_id: str) -> None:
        """The key was revoked, or its end was moved: it is looked up anew, and so are tokens that stand for it."""
        self._num_forgotten += 1
        self._asked.clear()
        for digest in [digest for digest, (known, _) in self._known.items() if known.key_id == key_id]:
            del self._known[digest]

    async def _ask_once(self, digest: bytes, secret: str, address: str) -> Principal | None:
        """Many requests with one key at the same time are one question."""
        asked = self._asked.get(digest)
        if asked is None:
            asked = self._asked[digest] = asyncio.ensure_future(self._ask(digest, secret, address))
            asked.add_done_callback(partial(self._answered, digest))
        return await asyncio.shield(asked)

    def _answered(self, digest: bytes, asked: asyncio.Future[Principal | None]) -> None:
        if self._asked.get(digest) is asked:
            del self._asked[digest]

    async def _ask(self, digest: bytes, secret: str, address: str) -> Principal | None:
        """A key that was good lately is no guess; a token is none at all, as nobody else can sign one."""
        was_good = time.monotonic() - self._were_good.get(digest, -GOOD_S) < GOOD_S
        if self._guesses is None or was_good or secret.startswith(TOKEN):
            return await self._authenticate(secret)
        wait_s = self._guesses.wait_s(address)
        if wait_s:
            raise GuessingError(f"too many unknown keys came from this address: try again in {wait_s} s")
        self._guesses.count(address)
        principal = await self._authenticate(secret)
        if principal is not None:
            self._guesses.forgive(address)
        return principal


def _has_expired(principal: Principal) -> bool:
    return principal.expires_at is not None and principal.expires_at <= time.time()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()


def key_guard(keys: KeyCache, underway: Underway) -> Guard:
    """A guard that puts the caller's principal into the request, or refuses it."""

    async def require_key(connection: Connection, handler: BaseRouteHandler) -> None:
        host = connection.client.host if connection.client is not None else ""
        principal = await keys.principal(secret_of(connection), address_of(host))
        connection.scope["user"] = principal
        underway.begin(principal.key_id, principal.tenant_id, connection.scope["path"])
        CALLER.set(principal.tenant_id)
        bind_contextvars(tenant=principal.tenant_name, tenant_id=principal.tenant_id)

    return require_key


def key_itself_guard(connection: Connection, handler: BaseRouteHandler) -> None:
    """What lasts isn't for a token that ends soon. Runs after the key guard."""
    if secret_of(connection).startswith(TOKEN):
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
