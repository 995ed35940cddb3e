"""A loop that makes no progress ends its process; one that rests or goes on doesn't."""

from __future__ import annotations

import os
import threading

import pytest

from tests.service import until
from tinsmith.ipc.pulse import SERVING, STARTING, Pulse, Stethoscope, percent_read, reading
from tinsmith.worker import watchdog as module
from tinsmith.worker.watchdog import EXIT_HUNG, Watchdog, watch


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


@pytest.mark.parametrize(
    ("timeout_s", "expected_s", "limit_s"), [(0, 0.0, 300), (0, 20.0, 600), (0, None, 1800), (5, None, 5), (5, 20.0, 5)]
)
def test_its_patience_follows_what_was_measured(
    now: list[float], timeout_s: float, expected_s: float | None, limit_s: float
) -> None:
    watchdog = Watchdog(timeout_s)
    assert not watchdog.is_overdue, "nothing has begun"
    watchdog.begin(expected_s)
    now[0] += limit_s - 0.5
    assert not watchdog.is_overdue
    now[0] += 1
    assert watchdog.is_overdue
    watchdog.begin(expected_s)
    assert not watchdog.is_overdue, "the loop went on"
    watchdog.rest()
    now[0] += 1e6
    assert not watchdog.is_overdue, "it waits for work"


def test_it_beats_and_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    stop = threading.Event()

    def end(status: int) -> None:
        ended.append(status)
        stop.set()

    monkeypatch.setattr(module, "BEAT_S", 0.01)
    monkeypatch.setattr(os, "_exit", end)
    watchdog, ear = Watchdog(0.05), Stethoscope()
    heard: list[bytes] = []
    is_serving = threading.Event()
    sign = lambda: SERVING if is_serving.is_set() else STARTING  # noqa: E731
    thread = watch(watchdog, Pulse(ear.inherited_fd), stop, sign)
    until(lambda: heard.append(ear.hear()) or STARTING in b"".join(heard), 10)
    is_serving.set()
    until(lambda: heard.append(ear.hear()) or SERVING in b"".join(heard), 10)
    assert not ended
    watchdog.begin()
    thread.join(10)
    assert ended == [EXIT_HUNG]
    ear.given()
    ear.close()


def test_the_first_beat_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 3600.0)
    stop, ear = threading.Event(), Stethoscope()
    thread = watch(Watchdog(), Pulse(ear.inherited_fd), stop, lambda: STARTING)
    until(lambda: ear.hear() == STARTING, 10)
    stop.set()
    thread.join(10)
    ear.given()
    ear.close()


def test_the_pulse_says_how_far_weights_are_read() -> None:
    for share, percent in ((0.0, 0), (0.434, 43), (1.0, 100), (7.0, 100)):
        assert percent_read(STARTING + reading(share)) == percent
        assert SERVING not in reading(share)
    assert percent_read(b"") is None
    assert percent_read(reading(0.5) + SERVING) is None


def test_a_full_pipe_and_a_closed_one_hold_nobody_up() -> None:
    ear = Stethoscope()
    pulse = Pulse(ear.inherited_fd)
    for _ in range(70_000):
        pulse.beat()
    ear.close()
    pulse.beat()
    ear.given()
