"""Answers that are costly to make: one is made at a time, and many who ask for the same at once cost one."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable

TTL_S = 5.0
MAX_KEPT = 8


class Once:
    """Keeps what was made for `TTL_S`. For the event loop's own thread; what makes answers runs elsewhere."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._kept: OrderedDict[Hashable, tuple[float, bytes]] = OrderedDict()

    async def answer(self, key: Hashable, make: Callable[[], Awaitable[bytes]]) -> bytes:
        """The answer of `key`, made at most `TTL_S` ago. What `make` raises is raised, and not kept."""
        async with self._lock:
            until, body = self._kept.get(key, (0.0, b""))
            if until <= time.monotonic():
                body = await make()
                self._kept[key] = (time.monotonic() + TTL_S, body)
                self._kept.move_to_end(key)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return body
