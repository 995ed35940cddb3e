"""Overload: a queue that stands is told from a burst, and only those who ask for much are refused."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from tinsmith.api.pressure import BUSY, ENOUGH, FEW, INTERVAL_S, RELAX_S, SINGLE, STAY_S, TARGET_S, Pressure
from tinsmith.errors import CapacityError
from tinsmith.types import TenantId

CROWD, QUIET = TenantId("crowd"), TenantId("quiet")


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

    async def count(tenant_id: TenantId) -> int:
        return queued[tenant_id]

    async def main() -> None:
        pressure = Pressure(lambda: 2 * TARGET_S, count)
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
