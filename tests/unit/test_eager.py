from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest

from tinsmith.api.eager import begin

CALLER: ContextVar[str] = ContextVar("caller", default="nobody")


def test_what_waits_for_nothing_is_over_at_once() -> None:
    done: list[int] = []

    async def brief() -> None:
        done.append(1)

    async def scenario() -> None:
        assert begin(brief(), asyncio.get_running_loop()) is None
        assert done == [1]

    asyncio.run(scenario())


def test_what_waits_goes_on_as_a_task_with_its_own_context() -> None:
    seen: list[object] = []

    async def long(future: asyncio.Future[int]) -> None:
        token = CALLER.set("alice")
        seen.append(await future)
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        seen.append(CALLER.get())
        CALLER.reset(token)
        with pytest.raises(KeyError):
            await failing()

    async def failing() -> None:
        await asyncio.sleep(0)
        raise KeyError("mine")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        task = begin(long(future), loop)
        assert task is not None
        assert seen == []
        loop.call_later(0.001, future.set_result, 7)
        await task
        assert (seen, CALLER.get()) == ([7, "alice"], "nobody")

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_task_that_was_begun_can_be_cancelled_and_hears_of_failures(turns: int) -> None:
    ended: list[str] = []

    async def waiting(future: asyncio.Future[None]) -> None:
        try:
            await future
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        except ValueError:
            ended.append("failed")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        task = begin(waiting(loop.create_future()), loop)
        broken: asyncio.Future[None] = loop.create_future()
        other = begin(waiting(broken), loop)
        assert task is not None
        assert other is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        broken.set_exception(ValueError("no"))
        await asyncio.wait([task, other])
        assert task.cancelled()
        assert not other.cancelled()
        assert sorted(ended) == (["cancelled", "failed"] if turns else ["failed"])

    asyncio.run(scenario())


def test_what_is_raised_before_it_waits_is_raised_at_once() -> None:
    async def broken() -> None:
        raise KeyError("mine")

    async def scenario() -> None:
        with pytest.raises(KeyError):
            begin(broken(), asyncio.get_running_loop())

    asyncio.run(scenario())
