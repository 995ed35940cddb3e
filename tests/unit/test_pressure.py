"""Overload: a queue that stands is told from a burst, and only those who ask for much are refused."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tinsmith.api.pressure import FEW, INTERVAL_S, TARGET_S, Pressure
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
