from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tinsmith.api import together as together_module
from tinsmith.api.together import AT_MOST, Brief, Together
from tinsmith.errors import NotFoundError, TakenError
from tinsmith.types import TenantId

ALICE, BOB = TenantId("alice"), TenantId("bob")


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def test_calls_that_come_meanwhile_are_the_next_batch(executor: ThreadPoolExecutor) -> None:
    batches: list[list[int]] = []
    go_on = threading.Event()

    def carry_out(calls: Sequence[int]) -> list[int]:
        batches.append(list(calls))
        assert go_on.wait(10)
        return [call * 2 for call in calls]

    async def scenario() -> list[int]:
        together: Together[int, int] = Together(executor, carry_out)
        first = asyncio.create_task(together.ask(ALICE, 0))
        while not batches:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(together.ask(ALICE, n)) for n in range(1, 5)]
        await asyncio.sleep(0.01)
        go_on.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(scenario()) == [0, 2, 4, 6, 8]
    assert batches == [[0], [1, 2, 3, 4]]


def test_a_tenant_with_many_calls_leaves_another_its_turn(executor: ThreadPoolExecutor) -> None:
    batches: list[list[str]] = []

    def carry_out(calls: Sequence[str]) -> list[str]:
        batches.append(list(calls))
        return list(calls)

    async def scenario() -> None:
        together: Together[str, str] = Together(executor, carry_out)
        many = [asyncio.create_task(together.ask(ALICE, f"a{n}")) for n in range(3 * AT_MOST)]
        one = asyncio.create_task(together.ask(BOB, "b"))
        await asyncio.gather(one, *many)

    asyncio.run(scenario())
    assert len(batches[0]) == AT_MOST
    assert "b" in batches[0][:2]
    assert [call for batch in batches for call in batch if call != "b"] == [f"a{n}" for n in range(3 * AT_MOST)]


def test_an_outcome_that_is_an_error_is_its_own_calls_alone(executor: ThreadPoolExecutor) -> None:
    def carry_out(calls: Sequence[int]) -> list[int | Exception]:
        return [ValueError(call) if call == 1 else call for call in calls]

    async def scenario() -> list[int | BaseException]:
        together: Together[int, int] = Together(executor, carry_out)
        return await asyncio.gather(*(together.ask(ALICE, n) for n in range(3)), return_exceptions=True)

    zero, one, two = asyncio.run(scenario())
    assert (zero, two) == (0, 2)
    assert isinstance(one, ValueError)


def test_what_the_batch_raises_is_for_all_and_the_next_goes_on(executor: ThreadPoolExecutor) -> None:
    failures = [RuntimeError("full")]

    def carry_out(calls: Sequence[int]) -> list[int]:
        if failures:
            raise failures.pop()
        return list(calls)

    async def scenario() -> None:
        together: Together[int, int] = Together(executor, carry_out)
        errors = await asyncio.gather(*(together.ask(ALICE, n) for n in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [RuntimeError] * 3
        assert await together.ask(ALICE, 7) == 7

    asyncio.run(scenario())


def test_a_caller_that_left_costs_nobody_his_answer(executor: ThreadPoolExecutor) -> None:
    async def scenario() -> int:
        together: Together[int, int] = Together(executor, list)
        gone = asyncio.create_task(together.ask(ALICE, 1))
        stays = asyncio.create_task(together.ask(ALICE, 2))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert asyncio.run(scenario()) == 2


def at_once(call: int) -> int:
    if call < 0:
        raise NotFoundError(f"{call}")
    if call == 0:
        raise TakenError("by another")
    return threading.get_ident()


def test_a_lone_call_is_carried_out_on_the_loop_and_one_that_would_wait_is_not(executor: ThreadPoolExecutor) -> None:
    def carry_out(calls: Sequence[int]) -> list[int]:
        return [threading.get_ident() for _ in calls]

    async def scenario() -> None:
        together: Together[int, int] = Together(executor, carry_out, at_once)
        here = threading.get_ident()
        assert await together.ask(ALICE, 1) == here
        with pytest.raises(NotFoundError):
            await together.ask(ALICE, -1)
        assert await together.ask(ALICE, 0) != here
        two = await asyncio.gather(*(together.ask(ALICE, n) for n in (1, 2)))
        assert here not in two
        assert await together.ask(ALICE, 1) == here

    asyncio.run(scenario())


def test_after_a_slow_call_the_loop_is_left_alone_until_one_was_brief(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together_module, "BRIEF_S", 0.05)
    seconds = {"one": 0.1, "all": 0.1}

    def one(call: int) -> str:
        time.sleep(seconds["one"])
        return "one"

    def carry_out(calls: Sequence[int]) -> list[str]:
        time.sleep(seconds["all"])
        return ["all" for _ in calls]

    async def scenario() -> list[str]:
        together: Together[int, str] = Together(executor, carry_out, one)
        found = [await together.ask(ALICE, 0), await together.ask(ALICE, 1)]
        seconds.update(one=0.0, all=0.0)
        return [*found, *[await together.ask(ALICE, n) for n in range(2)]]

    assert asyncio.run(scenario()) == ["one", "all", "all", "one"]
    assert Brief().is_now
