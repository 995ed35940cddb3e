from __future__ import annotations

import asyncio
import time

import pytest

from tinsmith.api.waiters import Waiters
from tinsmith.types import OpId


@pytest.mark.parametrize("turns", range(5))
def test_watching_ends_though_a_ring_comes_at_the_same_moment(turns: int) -> None:
    """asyncio.wait_for, up to Python 3.11, forgets a cancellation that meets the end of what it waits for."""

    async def nothing(ids: list[OpId]) -> list[OpId]:
        return []

    async def scenario() -> None:
        waiters = Waiters(None, 60.0)
        async with waiters.watching(nothing):
            await asyncio.sleep(0.01)
            waiters.ring()
            for _ in range(turns):
                await asyncio.sleep(0)

    started = time.monotonic()
    asyncio.run(asyncio.wait_for(scenario(), 5))
    assert time.monotonic() - started < 4
