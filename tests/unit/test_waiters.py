from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tinsmith.api.brief import BRIEF_S
from tinsmith.api.waiters import FEW, Awaited, Ended, Waiters
from tinsmith.ipc.bell import Bell, Ringer
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


def test_a_ring_is_answered_by_a_look_on_the_loop_while_few_are_awaited_and_looks_are_brief(tmp_path: Path) -> None:
    looks: list[tuple[str, int]] = []

    async def elsewhere(awaited: Sequence[Awaited]) -> Mapping[Awaited, Ended]:
        looks.append(("elsewhere", len(awaited)))
        return dict.fromkeys(awaited)

    def here(awaited: Sequence[Awaited]) -> Mapping[Awaited, Ended]:
        looks.append(("here", len(awaited)))
        if len(looks) == 1:
            raise OSError("once")
        return dict.fromkeys(awaited)

    async def ended(waiters: Waiters, ringer: Ringer, count: int) -> bool:
        futures = [waiters.expect(OpId(f"req-{n}")) for n in range(count)]
        ringer.ring()
        return all(await asyncio.gather(*(waiters.hold(future, 10.0) for future in futures)))

    async def scenario() -> None:
        with Bell(tmp_path / "bell") as bell:
            waiters, ringer = Waiters(bell, 60.0), Ringer(tmp_path / "bell")
            async with waiters.watching(elsewhere, at_once=here):
                assert await ended(waiters, ringer, 1)
                assert await ended(waiters, ringer, 1)
                assert await ended(waiters, ringer, FEW + 1)
                waiters.brief.timed(lambda: time.sleep(2 * BRIEF_S))
                assert await ended(waiters, ringer, 1)
            ringer.close()

    asyncio.run(scenario())
    assert looks == [("here", 1), ("elsewhere", 1), ("here", 1), ("elsewhere", FEW + 1), ("elsewhere", 1)]


def test_a_hold_ends_when_its_time_is_over() -> None:
    async def scenario() -> None:
        waiters = Waiters(None, 60.0)
        future = waiters.expect(OpId("req-1"))
        assert not await waiters.hold(future, 0.01)
        assert waiters.outcome(future) is None

    asyncio.run(scenario())
