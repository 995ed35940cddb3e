"""Those who are turned away come back as fast as they can be let in, and a few more."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

import pytest

from tinsmith.api.waits import LEAST_S, MAX_WAIT_S, MORE, MOST_S, SPREAD, Waits

LOOK_S = 0.05


def refusals(num_clients: int, per_s: float, again_s: float, seconds: float) -> Iterator[tuple[float, int, int]]:
    """Clients who come all at once, and again so long after they were let in; `per_s` of them are. Yields the time,
    how many were let in and how many were refused between two looks."""
    waits, order = Waits(0.0), count()
    due = [(0.1, next(order)) for _ in range(num_clients)]
    room, now = 0.0, 0.0
    while now < seconds:
        now += LOOK_S
        room = min(room + per_s * LOOK_S, per_s)  # a second of them, where nobody comes
        num_let_in = num_told = 0
        while due[0][0] <= now:
            _, number = heapq.heappop(due)
            if room >= 1:
                room -= 1
                num_let_in += 1
                waits.let_in()
                heapq.heappush(due, (now + again_s, number))
            else:
                num_told += 1
                heapq.heappush(due, (now + waits.told(now), number))
        waits.look(now)
        yield now, num_let_in, num_told


@pytest.mark.parametrize(("num_clients", "again_s"), [(5_000, 1.5), (5_000, 5.0), (2_000, 0.1), (500, 0.0)])
def test_few_come_in_vain_and_all_that_can_be_served_come(num_clients: int, again_s: float) -> None:
    per_s = 1_000.0 if num_clients > 500 else 100.0
    seen = [(let_in, told) for now, let_in, told in refusals(num_clients, per_s, again_s, 40.0) if now > 10.0]
    num_let_in, num_told = (sum(of) for of in zip(*seen, strict=True))
    assert num_let_in >= 0.97 * 30 * per_s
    assert num_told <= 2 * MORE * num_let_in


def test_more_than_can_ever_wait_are_told_the_longest() -> None:
    waits = Waits(0.0)
    for now in (1.0, 2.0, 3.0):
        told = [waits.told(now) for _ in range(1_000)]
        waits.let_in()
        waits.look(now)
    assert max(told) <= MAX_WAIT_S
    assert sum(told) / len(told) == pytest.approx(MOST_S, rel=0.05)


def test_who_was_refused_together_does_not_come_back_together() -> None:
    waits = Waits(0.0)
    told = [waits.told(0.0) for _ in range(300)]
    assert {told.count(wait_s) for wait_s in set(told)} <= set(range(70, 155))
    assert (min(told), max(told)) == (LEAST_S * (1 - SPREAD), LEAST_S * (1 + SPREAD))


def test_those_who_have_come_back_are_not_counted_for_ever() -> None:
    waits = Waits(0.0)
    for now in range(1_000):
        waits.told(float(now))
        waits.look(float(now))
    assert len(waits._away) <= MAX_WAIT_S
