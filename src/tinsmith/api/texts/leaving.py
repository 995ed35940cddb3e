"""Work that a client waits for on its connection, and that ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from tinsmith.api.auth import Call
from tinsmith.errors import UserError

T = TypeVar("T")


async def unless_gone(request: Call, work: Awaitable[T]) -> T:
    """What `work` comes to. It is cancelled when the client closes its connection; the request's body was read before.

    Raises:
        UserError: the client has gone, and nobody reads this.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise UserError("the connection was closed before the answer was there")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Call) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
