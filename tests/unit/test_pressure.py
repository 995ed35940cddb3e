"""Overload: a queue that stands is told from a burst, and only those who ask for much are refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import ExitStack

import pytest

from tinsmith.api import pressure as pressure_module
from tinsmith.api.backlog import ENOUGH, LEAST_PACE, LONG_S, PACE_OVER_S, Backlog
from tinsmith.api.pressure import (
    BUSY,
    CONTENDED,
    FEW,
    INTERVAL_S,
    OVER,
    RELAX_S,
    SINGLE,
    STAY_S,
    TARGET_S,
    Pressure,
)
from tinsmith.errors import CapacityError
from tinsmith.types import TenantId

CROWD, QUIET, STUCK = TenantId("crowd"), TenantId("quiet"), TenantId("stuck")


def backlog(queued: Mapping[TenantId, int], ended: Mapping[TenantId, int]) -> Backlog:
    async def count() -> Mapping[TenantId, int]:
        return queued

    async def ended_since(since: float) -> Mapping[TenantId, int]:
        return ended

    return Backlog(count, ended_since)


def pressed() -> Pressure:
    pressure = Pressure(lambda: 0.0)
    pressure.note(0.0, 100.0)
    pressure.note(2 * TARGET_S, 100.0 + INTERVAL_S + 0.1)
    return pressure


def test_a_queue_that_stands_refuses_those_who_ask_for_much() -> None:
    pressure = pressed()
    assert pressure.is_high
    with ExitStack() as stack:
        for _ in range(FEW):
            stack.enter_context(pressure.under_way(CROWD))
        with pytest.raises(CapacityError, match="send the request again"):
            stack.enter_context(pressure.under_way(CROWD))
        assert pressure.refuses(CROWD)
        stack.enter_context(pressure.under_way(QUIET))
    assert not pressure.refuses(CROWD), "they have ended"


def test_a_burst_is_no_overload() -> None:
    pressure = Pressure(lambda: 0.0)
    pressure.note(0.0, 100.0)
    pressure.note(10 * TARGET_S, 100.0 + INTERVAL_S / 2)
    assert not pressure.is_high
    pressure = pressed()
    pressure.note(0.0, 200.0)
    assert not pressure.is_high


def test_who_has_much_in_the_queue_is_refused_until_it_is_carried_out() -> None:
    """What was accepted counts until it was seen to be gone; without that, more is accepted than can be done."""
    queued = {CROWD: 0}

    async def main() -> None:
        pressure = Pressure(lambda: 2 * TARGET_S, backlog(queued, {}))
        async with pressure.watching():
            while not pressure.is_high:
                await asyncio.sleep(0.01)
            for _ in range(ENOUGH):
                with pressure.under_way(CROWD):
                    pass
                queued[CROWD] += 1
            assert not pressure.refuses(CROWD), "who sends one after the other isn't the trouble"
            with ExitStack() as stack:
                for _ in range(SINGLE):
                    stack.enter_context(pressure.under_way(CROWD))
                assert pressure.refuses(CROWD)
                assert not pressure.refuses(QUIET)
                queued[CROWD] = ENOUGH - 1
                while pressure.refuses(CROWD):
                    await asyncio.sleep(0.01)

    asyncio.run(main())


def test_it_is_over_once_it_was_calm_for_a_while_and_later_where_many_are_refused() -> None:
    pressure = pressed()
    began = 100.0 + INTERVAL_S + 0.1
    pressure.note(0.0, began + RELAX_S / 2)
    assert pressure.is_high, "calm for a moment"
    with ExitStack() as stack:
        for _ in range(FEW):
            stack.enter_context(pressure.under_way(CROWD))
        for _ in range(BUSY):
            assert pressure.refuses(CROWD)
        pressure.note(0.0, began + RELAX_S + 0.1)
        assert pressure.is_high, "all who were refused would come back"
    pressure.note(0.0, began + 2 * RELAX_S)
    assert pressure.is_high
    pressure.note(0.0, began + 3 * RELAX_S)
    assert not pressure.is_high
    pressure = pressed()
    for second in range(int(STAY_S) + 5):
        with ExitStack() as stack:
            for _ in range(FEW):
                stack.enter_context(pressure.under_way(CROWD))
            for _ in range(BUSY):
                pressure.refuses(CROWD)
        pressure.note(0.0, began + second)
        if not pressure.is_high:
            break
    assert not pressure.is_high, "it is tried after a while whatever they ask"


def test_where_cores_are_short_whose_backlog_is_long_is_refused_until_nobody_is() -> None:
    paces = {CROWD: int(3 * ENOUGH * PACE_OVER_S / LONG_S), QUIET: 1}  # so 3 * ENOUGH of the crowd's take `LONG_S`
    queued = {CROWD: 2 * ENOUGH, QUIET: ENOUGH + 1, STUCK: 8 * ENOUGH}
    waiting = backlog(queued, paces)
    pressure = Pressure(lambda: 0.0, waiting)

    def look() -> None:
        asyncio.run(waiting.look())
        for tenant_id in queued:
            use_up(waiting, tenant_id)

    look()
    now = time.monotonic()
    assert not pressure.refuses(QUIET), "nobody takes a core from anybody"
    for _ in range(OVER):
        pressure.note_contended(4 * CONTENDED, now)
    assert pressure.is_crowded
    assert not pressure.is_high
    assert pressure.refuses(QUIET)
    assert not pressure.refuses(CROWD), "it goes fast"
    assert not pressure.refuses(STUCK), "nothing of it is carried out at all, so it takes nobody's time"
    queued[CROWD] = 4 * ENOUGH
    look()
    assert pressure.refuses(CROWD)
    for _ in range(5 * OVER):
        pressure.note_contended(0.0, now + RELAX_S / 2)
    assert pressure.is_crowded, "somebody was refused just now"
    pressure.note_contended(0.0, now + 2 * RELAX_S)
    assert not pressure.is_crowded
    assert not pressure.refuses(CROWD)


def test_refusals_alone_do_not_keep_it_up() -> None:
    waiting = backlog({CROWD: 2 * ENOUGH}, {CROWD: 1})
    pressure = Pressure(lambda: 0.0, waiting)
    asyncio.run(waiting.look())
    use_up(waiting, CROWD)
    long_ago = time.monotonic() - STAY_S - 1.0
    for _ in range(OVER):
        pressure.note_contended(1.0, long_ago)
    for _ in range(5 * OVER):
        pressure.note_contended(0.0, long_ago)
    assert pressure.refuses(CROWD)
    pressure.note_contended(0.0, time.monotonic())
    assert not pressure.is_crowded


def test_as_many_come_in_as_end_and_some_in_any_case() -> None:
    """Among those that were refused may be the one that all the others wait for."""
    waiting = backlog({CROWD: 2 * ENOUGH, QUIET: 2 * ENOUGH}, {CROWD: int(100 * PACE_OVER_S), QUIET: 1})
    pressure = Pressure(lambda: 0.0, waiting)

    async def main() -> None:
        for _ in range(OVER):
            pressure.note_contended(1.0, time.monotonic())
        await waiting.look()
        for tenant_id in (CROWD, QUIET):
            use_up(waiting, tenant_id)
        await asyncio.sleep(0.5)
        await waiting.look()

    asyncio.run(main())
    assert 40 <= let_in(pressure, CROWD) <= 110
    assert 1 <= let_in(pressure, QUIET) <= 1 + LEAST_PACE


def use_up(waiting: Backlog, tenant_id: TenantId) -> None:
    """What may come although the backlog is long, comes."""
    for _ in range(ENOUGH // 2):
        waiting.came(tenant_id)


def let_in(pressure: Pressure, tenant_id: TenantId) -> int:
    num = 0
    while not pressure.refuses(tenant_id):
        with pressure.under_way(tenant_id):
            num += 1
    return num


def test_what_comes_counts_before_it_is_counted() -> None:
    waiting = backlog({CROWD: ENOUGH - 1}, {CROWD: 1})
    pressure = Pressure(lambda: 0.0, waiting)
    asyncio.run(waiting.look())
    for _ in range(OVER):
        pressure.note_contended(1.0, time.monotonic())
    assert 1 <= let_in(pressure, CROWD) <= 1 + LEAST_PACE


def test_what_ends_between_two_looks_is_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that took long isn't followed by another for as long as the worker needs for all that was counted."""
    waiting = backlog({CROWD: 2 * ENOUGH, STUCK: 2 * ENOUGH}, {CROWD: int(ENOUGH * PACE_OVER_S)})
    asyncio.run(waiting.look())
    looked_at = time.monotonic()
    assert waiting.has_enough(CROWD)
    monkeypatch.setattr(time, "monotonic", lambda: looked_at + 1.1)
    assert not waiting.has_enough(CROWD)
    assert waiting.has_enough(STUCK), "none of it ended"


def test_where_cores_are_short_and_backlogs_long_what_comes_is_let_come_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dozes: list[float] = []
    monkeypatch.setattr(pressure_module, "_doze", dozes.append)
    shares = {"now": 1.0}

    async def main() -> None:
        pressure = Pressure(lambda: 0.0, backlog({CROWD: 2 * ENOUGH}, {CROWD: 1}), lambda: lambda: shares["now"])
        async with pressure.watching():
            with pressure.under_way(CROWD):
                while not pressure.is_crowded:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                assert not dozes, "nobody was refused"
                while not pressure.refuses(CROWD):
                    with pressure.under_way(CROWD):
                        await asyncio.sleep(0)
                while len(dozes) < 3:
                    await asyncio.sleep(0.01)
            shares["now"] = 0.0
            while pressure.is_crowded:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            dozes.clear()
            await asyncio.sleep(0.2)
            assert not dozes

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_failing_look_at_what_waits_ends_nothing() -> None:
    """Else one busy database would leave a server overloaded for good."""
    looks = 0

    async def count() -> Mapping[TenantId, int]:
        raise AssertionError("the first look has failed before")

    async def ended_since(since: float) -> Mapping[TenantId, int]:
        nonlocal looks
        looks += 1
        raise CapacityError("the database was busy")

    async def main() -> None:
        age_s = 2 * TARGET_S
        pressure = Pressure(lambda: age_s, Backlog(count, ended_since))
        async with pressure.watching():
            while looks < 3:
                await asyncio.sleep(0.01)
            assert pressure.is_high
            age_s = 0.0
            while pressure.is_high:
                await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(main(), 20))
