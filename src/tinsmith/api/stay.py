"""How long a connection stays: whoever waits on its behalf stops waiting when it is lost.

A poll costs some 10 kB while it is held. Without this, clients that ask and leave would have the server hold polls for
nobody, as many as they can ask for within `poll_hold_s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from tinsmith.types import TenantId


class Stay:
    """Of one connection. For the event loop's own thread.

    Args:
        cut: closes the connection at once.
        settle: has it count as a tenant's, that brings a poll or something else; raises CapacityError if the tenant has
            as many as it may.
    """

    __slots__ = ("__weakref__", "_futures", "cut", "is_mixed", "is_over", "key_id", "on_end", "settle", "tenant_id")

    def __init__(self, cut: Callable[[], None], settle: Callable[[TenantId, bool], None]) -> None:
        self._futures: set[asyncio.Future[Any]] = set()
        self.is_over = False
        self.cut, self.settle = cut, settle
        self.key_id: str | None = None  # of the key that was last used on it
        self.tenant_id: TenantId | None = None
        self.is_mixed = False  # brought requests of several tenants, or others than those that fill the queue
        self.on_end: Callable[[Stay], None] | None = None

    def end(self) -> None:
        """The connection is lost: nothing is waited for any more."""
        self.is_over = True
        self.release()
        self._futures.clear()
        if self.on_end is not None:
            self.on_end(self)
        self.on_end, self.cut, self.settle = None, _nothing, _nothing  # nothing leads back to the connection

    @property
    def is_polling(self) -> bool:
        """Whether what is awaited for it can be asked for again."""
        return bool(self._futures)

    def release(self) -> None:
        """Its polls are answered now."""
        for future in self._futures:
            _give_up(future)

    def add(self, future: asyncio.Future[Any]) -> None:
        """It is awaited for this connection now; it comes to False if that is lost meanwhile, or was before."""
        if self.is_over:
            _give_up(future)
        else:
            self._futures.add(future)

    def discard(self, future: asyncio.Future[Any]) -> None:
        self._futures.discard(future)


STAY: ContextVar[Stay | None] = ContextVar("stay", default=None)  # of the connection that is being answered


def _nothing(*_: object) -> None: ...


def _give_up(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_result(False)
