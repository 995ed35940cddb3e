from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.conftest import World
from tinsmith.api import telling
from tinsmith.api.pauses import CAPACITY, Waiting
from tinsmith.api.telling import Telling


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AFTER_S", "APART_S", "LEAST_S"):
        monkeypatch.setattr(telling, name, 0.02)


async def threaded(work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(work, *args)


@pytest.mark.usefixtures("brief")
def test_polls_that_are_over_before_anybody_looks_end_nothing(world: World) -> None:
    run = world.run()
    op = world.put(run, 1).row

    async def scenario() -> bool:
        told = Telling(lambda _: Waiting(CAPACITY, "others are ahead"))
        loop = asyncio.get_running_loop()
        async with told.watching(threaded):
            for turns in range(4):
                await asyncio.sleep(0.05)
                with told.of_poll(op, loop.create_future()):
                    for _ in range(turns):
                        await asyncio.sleep(0)
            with told.of_poll(op, news := loop.create_future()):
                return await asyncio.wait_for(news, 5) is False

    assert asyncio.run(scenario())
