"""Passes that keep the engine busy: clients, their network and one engine, simulated."""

from __future__ import annotations

import heapq

import pytest

from tinsmith.types import RunId
from tinsmith.worker.tempo import MAX_AWAY_S, Tempo

WORK = 100


def simulate(num_clients: int, away_s: float, pass_s: float, seconds: float = 60.0) -> tuple[float, float]:
    """Naive clients, each `away_s` between an answer and its next request, whose work takes `pass_s` alone.

    (the share of the last half of the time in which the engine computed, how many runs shared a pass there).
    """
    tempo = Tempo()
    arrivals = [(0.0, client) for client in range(num_clients)]
    heapq.heapify(arrivals)
    now, busy, shared = 0.0, 0.0, []
    while now < seconds:
        if arrivals[0][0] > now:
            now = arrivals[0][0]
        most = tempo.most_work(WORK / pass_s, now)
        chosen: list[tuple[float, int]] = []
        while arrivals and arrivals[0][0] <= now and (most is None or not chosen or (len(chosen) + 1) * WORK <= most):
            chosen.append(heapq.heappop(arrivals))
        for arrived_at, client in chosen:
            tempo.begun(RunId(str(client)), WORK, arrived_at, now)
        now += pass_s * len(chosen)
        for _, client in chosen:
            tempo.ended(RunId(str(client)), now)
            heapq.heappush(arrivals, (now + away_s, client))
        if now > seconds / 2:
            busy += pass_s * len(chosen)
            shared.append(len(chosen))
    return busy / (now - seconds / 2), sum(shared) / len(shared)


def test_distant_clients_keep_the_engine_busy() -> None:
    busy, shared = simulate(8, away_s=0.4, pass_s=0.07)
    assert busy >= 0.95
    assert shared >= 1.5


def test_clients_beside_the_server_share_one_pass() -> None:
    busy, shared = simulate(6, away_s=0.02, pass_s=0.1)
    assert busy >= 0.95
    assert shared == 6


def test_an_engine_that_cannot_be_filled_answers_whoever_is_there() -> None:
    busy, _ = simulate(3, away_s=1.0, pass_s=0.05)
    assert busy <= 0.16


@pytest.mark.parametrize("away_s", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("num_clients", [4, 16])
def test_nothing_is_idle_where_it_could_be_filled(num_clients: int, away_s: float) -> None:
    assert simulate(num_clients, away_s, pass_s=0.1)[0] >= 0.88


def test_requests_sent_ahead_are_not_held_back() -> None:
    tempo = Tempo()
    for round_ in range(5):
        for client in range(4):
            tempo.begun(RunId(str(client)), WORK, arrived_at=round_ - 0.9, now=float(round_))
            tempo.ended(RunId(str(client)), round_ + 0.4)
    assert tempo.most_work(WORK / 0.1, 5.0) is None


def test_who_has_left_is_forgotten() -> None:
    tempo = Tempo()
    for client in range(8):
        for start in (0.0, 0.5):
            tempo.begun(RunId(str(client)), WORK, arrived_at=start, now=start)
            tempo.ended(RunId(str(client)), start + 0.1)
    assert tempo.most_work(WORK / 0.07, 1.0) is not None
    assert tempo.most_work(WORK / 0.07, 1.0 + 3 * MAX_AWAY_S) is None


def test_one_run_alone_is_never_cut() -> None:
    tempo = Tempo()
    for start in (0.0, 0.5, 1.0):
        tempo.begun(RunId("a"), WORK, arrived_at=start, now=start)
        tempo.ended(RunId("a"), start + 0.1)
    assert tempo.most_work(WORK / 1.0, 1.2) is None
