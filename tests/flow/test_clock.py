"""The wall clock is set forward and back by hours: nobody looks silent, or alive, for that alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flow.house import House, settle
from tinsmith.machine.clock import Clock
from tinsmith.types import OpState, SessionId
from tinsmith.upkeep.janitor import note_step, sweep

HOURS = 3 * 3600.0


class Time:
    """Both clocks, by hand."""

    def __init__(self) -> None:
        self.wall, self.steady = time.time(), 50.0

    def run(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.steady)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "house")) as house:
        yield house


@pytest.mark.parametrize("by", [HOURS, -HOURS, 5.0, -5.0])
def test_a_step_is_seen_once_and_remembered_for_a_while(by: float) -> None:
    now = Time()
    clock = now.clock()
    now.run(1000)
    assert clock.step() == 0.0
    assert clock.is_even(10.0)
    now.wall += by
    now.run(7)
    assert clock.step() == pytest.approx(by)
    assert clock.step() == 0.0
    assert not clock.is_even(10.0)
    now.run(9)
    assert not clock.is_even(10.0)
    now.run(1)
    assert clock.is_even(10.0)


def test_a_slow_look_is_no_step() -> None:
    now = Time()
    clock = now.clock()
    for _ in range(100):
        now.steady += 0.5
        now.wall += 0.4  # between the two readings
        now.wall += 0.1
        assert clock.is_even(60.0)


def beat(house: House, at: float) -> SessionId:
    session = house.store.sessions.create(
        house.tenant, tags=[], user_metadata={}, sdk_version="0", project_id=None, display_name=None
    ).session_id
    house.store.sessions.beat(house.tenant, session, at)
    return session


def is_over(house: House, session: SessionId) -> bool:
    return house.store.sessions.get(house.tenant, session).finished_at is not None


@pytest.mark.parametrize("by", [HOURS, -HOURS])
def test_sessions_end_after_their_own_silence(house: House, by: float) -> None:
    timeout, start = house.settings.session_timeout_s, time.time()
    lively, silent = beat(house, start - 5), beat(house, start - timeout + 60)
    now = start + by
    note_step(house.store, house.settings, by, now)
    sweep(house.store, house.blobs, house.settings, now)
    assert not is_over(house, lively), "it was heard of five seconds ago"
    assert not is_over(house, silent)
    house.store.sessions.beat(house.tenant, lively, now + timeout)
    sweep(house.store, house.blobs, house.settings, now + timeout + 61)
    assert not is_over(house, lively)
    assert is_over(house, silent), "by the new time it has been silent long enough"


def test_a_step_of_nothing_changes_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house.store.silence, "clock_was_set", lambda *_: pytest.fail("called"))
    note_step(house.store, house.settings, 0.0, time.time())


def test_a_living_worker_keeps_its_runs_when_the_clock_is_put_forward(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = house.create_run()
    settle(house.worker("fake/base#0"))
    other = house.worker("fake/base#1")
    shift = shifted(monkeypatch)
    other.runs._clock = Clock(time.time)
    shift(HOURS)
    assert not other.runs.lease(), "its lease seems over, and that is the clock"
    assert house.store.runs.get(house.tenant, run).lease_owner == "fake/base#0"
    house.forward_backward(run, 1, [1])
    other.runs._clock._stepped_at -= house.settings.lease_s
    assert other.runs.lease(), "after a while without a renewal it is over"


def test_a_dead_workers_lease_ends_though_the_clock_was_put_back(house: House) -> None:
    run = house.create_run()
    settle(house.worker("fake/base#0"))
    house.forward_backward(run, 1, [1])
    back, lease_s = time.time() - HOURS, house.settings.lease_s
    other = house.store.workers.register("fake/base#1", "fake/base", lease_s, back)
    assert house.store.runs.lease(other, "fake/base", 10, back + 2 * lease_s) == []
    note_step(house.store, house.settings, -HOURS, back)
    (leased,) = house.store.runs.lease(other, "fake/base", 10, back + lease_s + 1)
    assert leased.run_id == run


def test_what_is_trained_meanwhile_is_done(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    shift = shifted(monkeypatch)
    run = house.create_run()
    worker = house.worker()
    worker.runs._clock = Clock(time.time)
    for seq, by in enumerate((0.0, HOURS, -2 * HOURS, 40 * HOURS), start=1):
        shift(by)
        op = house.forward_backward(run, seq, [seq])
        settle(worker)
        assert house.get(op).state is OpState.DONE


def shifted(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the wall clock of this process by so many seconds."""
    real, by = time.time, 0.0

    def shift(seconds: float) -> None:
        nonlocal by
        by += seconds

    monkeypatch.setattr(time, "time", lambda: real() + by)
    return shift
