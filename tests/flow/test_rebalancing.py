"""Runs that wait at one worker go to another that has nothing to do: without loss, and none goes back and forth."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.contract.depth import DEEPER
from tests.flow.house import House, settle, train
from tests.flow.test_two_workers import A, B, expected, holders, param, ready
from tinsmith.store.burdens import Burden
from tinsmith.types import OpState, RunId
from tinsmith.worker import rebalancing
from tinsmith.worker.loop import Worker
from tinsmith.worker.rebalancing import RETURN_S, STAY_S, Rebalancing, num_to_give

STEPS = 3


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "CHECK_S", 0.0)
    monkeypatch.setattr(rebalancing, "STAY_S", 0.0)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "house", workers_per_base=2, pass_max_tokens=3)) as house:
        yield house


def look(worker: Worker) -> None:
    """One turn, in which it finds what has come."""
    worker._heard_at, worker._must_look = float("-inf"), True
    worker._queue.distrust()
    worker.step()
    if worker._writer.num_pending:
        time.sleep(0.005)


def crowded(house: House, num_runs: int) -> tuple[Worker, Worker, list[RunId]]:
    """All runs are held by a worker that was alone; the other has come since."""
    first = ready(house, A)
    runs = [house.create_run() for _ in range(num_runs)]
    settle(first)
    for run in runs:
        train(house, run, range(1))
    settle(first)
    return first, ready(house, B), runs


def test_a_worker_without_work_gets_half_of_what_waits_and_all_is_computed_once(house: House, tmp_path: Path) -> None:
    first, second, runs = crowded(house, 6)
    ops = [op for run in runs for op in train(house, run, range(1, STEPS))]
    for _ in range(100):
        look(first)
        if holders(house, runs) == {A: 3, None: 3}:
            break
    settle(second)
    assert holders(house, runs) == {A: 3, B: 3}
    for worker in (first, second, first):
        settle(worker)
    assert {house.get(op).state for op in ops} == {OpState.DONE}
    assert {house.get(op).attempts for op in ops} == {1}
    right = expected(tmp_path, STEPS)
    for run in runs:
        holder = first if house.store.runs.get(house.tenant, run).lease_owner == A else second
        np.testing.assert_array_equal(param(holder, run), right)


def test_who_gives_dies_on_the_way_and_nothing_is_lost(house: House, tmp_path: Path) -> None:
    """Its state is being written, or written and its lease not given back yet."""
    first, second, runs = crowded(house, 4)
    ops = [op for run in runs for op in train(house, run, range(1, STEPS))]
    for _ in range(20):
        first._must_look = True
        first.step()
        if first.runs._giving:
            break
    assert first.runs._giving
    reborn = ready(house, A)
    for worker in (second, reborn, second, reborn):
        settle(worker)
    assert {house.get(op).state for op in ops} == {OpState.DONE}
    right = expected(tmp_path, STEPS)
    for run in runs:
        holder = reborn if house.store.runs.get(house.tenant, run).lease_owner == A else second
        np.testing.assert_array_equal(param(holder, run), right)


@settings(deadline=None, max_examples=60 if DEEPER else 6, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=4, max_size=24))
def test_whatever_is_asked_for_results_are_those_of_one_worker_and_moves_are_few(turns: list[tuple[int, int]]) -> None:
    """turns: a run that is asked for a step, and which workers have a turn after it."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        both = stack.enter_context(contextlib.closing(House(Path(directory) / "a", workers_per_base=2)))
        alone = stack.enter_context(contextlib.closing(House(Path(directory) / "b")))
        first, second, runs = crowded(both, 4)
        _, quiet = (alone.create_run() for _ in range(2)), alone.worker()
        same = [alone.create_run() for _ in range(4)]
        settle(quiet)
        for run in same:
            train(alone, run, range(1))
        steps = Counter[int]()
        for number, who in turns:
            steps[number] += 1
            train(both, runs[number], range(steps[number], steps[number] + 1))
            train(alone, same[number], range(steps[number], steps[number] + 1))
            for worker in [(first,), (second,), (first, second)][who]:
                look(worker)
        for worker in (first, second, first, second, quiet):
            settle(worker)
        for number in range(4):
            row = both.store.runs.get(both.tenant, runs[number])
            holder = first if row.lease_owner == A else second
            if steps[number]:
                np.testing.assert_array_equal(param(holder, runs[number]), alone.weights(same[number]))
        assert sum(both.store.runs.get(both.tenant, run).epoch - 1 for run in runs) <= 2, "half of four, once"


def test_who_gives_gives_half_of_the_difference_to_one_that_is_idle() -> None:
    own = Burden(A, 7, is_idle=False)
    assert num_to_give(A, [own, Burden(B, 0, is_idle=True)]) == 3
    assert num_to_give(A, [own, Burden(B, 0, is_idle=False)]) == 0
    assert num_to_give(A, [own, Burden(B, 6, is_idle=True)]) == 0
    assert num_to_give(A, [own, Burden(B, 9, is_idle=True)]) == 0
    assert num_to_give(A, [Burden(B, 0, is_idle=True)]) == 0


@given(st.lists(st.integers(0, 50), min_size=2, max_size=5), st.data())
def test_giving_comes_to_an_end(active: list[int], data: st.DataObject) -> None:
    """Whoever is idle when, every move makes the sum of squares smaller, and they end a run apart at most."""
    slots = [str(number) for number in range(len(active))]
    for _ in range(200):
        idle = min(range(len(active)), key=lambda n: active[n])
        burdens = [Burden(s, n, is_idle=k == idle) for k, (s, n) in enumerate(zip(slots, active, strict=True))]
        giving = [k for k, slot in enumerate(slots) if num_to_give(slot, burdens)]
        if not giving:
            break
        giver = data.draw(st.sampled_from(giving))
        before, num = sum(n * n for n in active), num_to_give(slots[giver], burdens)
        active[giver] -= num
        active[idle] += num
        assert sum(n * n for n in active) < before
    assert max(active) - min(active) <= 1


def test_a_run_stays_a_while_and_one_that_nobody_took_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "CHECK_S", 1.0)
    monkeypatch.setattr(rebalancing, "STAY_S", STAY_S)
    now = [100.0]
    one = Rebalancing(A, lambda: [Burden(A, 4, is_idle=False), Burden(B, 0, is_idle=True)], lambda: now[0])
    runs = [RunId(f"r{number}") for number in range(4)]
    since = dict.fromkeys(runs, 100.0)
    chosen = []
    for _ in range(int(STAY_S) + 2):
        now[0] += 1.01
        chosen.append(one.choose(runs, since) if one.is_due else [])
    assert chosen.index(runs[:2]) >= STAY_S - 2
    assert one.given == set(runs[:2])
    now[0] += RETURN_S
    assert not one.given
