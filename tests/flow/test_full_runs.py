"""Full runs through the worker: snapshots take turns at few places, and a worker's death loses none of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.flow.house import House, settle
from tests.flow.test_publishing import save, slow_writer, steps, train
from tinsmith import fake_engine
from tinsmith.fake_engine import FakeEngine, FakePass
from tinsmith.store.rows import OpRow
from tinsmith.types import OpState, RunId, SamplerId, TrainItem
from tinsmith.worker import full_turns


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., House]]:
    monkeypatch.setattr(fake_engine, "FULL_PLACES", 1)
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


def publish(house: House, count: int) -> list[SamplerId]:
    """Snapshots of one full run, each after a step."""
    run, seq, samplers = house.create_run(rank=0), 1, []
    for number in range(count):
        seq = train(house, run, seq)
        sampler, _ = save(house, run, seq, number)
        samplers.append(sampler)
        seq += 1
    return samplers


def test_more_snapshots_than_places_are_all_sampled_from(build: Callable[..., House]) -> None:
    house = build()
    samplers = publish(house, 4)
    worker = house.worker()
    settle(worker)
    ops = [house.sample(sampler, 1) for sampler in samplers]
    settle(worker)
    first = [house.result(op) for op in ops]
    assert len(set(first)) == len(first)
    again = [house.sample(sampler, 2) for sampler in samplers]
    settle(house.worker())
    assert [house.result(op) for op in again] == first


def test_a_dead_worker_loses_no_snapshot(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of those whose files weren't written, of which only one has a place; recorded results stay."""
    house = build()
    samplers = publish(house, 3)
    worker = house.worker()
    slow_writer(worker, monkeypatch)
    steps(worker, lambda: len(worker._publisher._unwritten) == len(samplers))
    worker._recorder.flush()
    ops = [house.sample(sampler, 1) for sampler in samplers]
    steps(worker, lambda: all(house.get(op).state.is_final for op in ops))
    recorded = [house.result(op) for op in ops]
    late = [house.sample(sampler, 2) for sampler in samplers]
    settle(house.worker())
    assert [house.result(op) for op in late] == recorded == [house.result(op) for op in ops]


def test_nobody_shares_a_pass_with_a_full_run(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do two of them: whose requests are quick is answered when they are computed."""
    begun: list[list[RunId]] = []
    start = FakeEngine.start_pass

    def noted(self: FakeEngine, items: Sequence[TrainItem]) -> FakePass:
        begun.append(sorted({item.run_id for item in items}))
        return start(self, items)

    monkeypatch.setattr(FakeEngine, "start_pass", noted)
    house = build()
    full, small, other, more = (house.create_run(rank=rank) for rank in (0, 4, 0, 8))
    worker = house.worker()
    settle(worker)
    ops = [house.forward_backward(run, 1, [1, 2]) for run in (full, small, other, more)]
    settle(worker)
    assert sorted(begun) == sorted([[full], sorted([small, more]), [other]])
    assert {house.get(op).state for op in ops} == {OpState.DONE}


def test_nobody_keeps_the_others_snapshots_out(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that always has a request under way holds the only place for a turn, no longer."""
    monkeypatch.setattr(full_turns, "TURN_S", 0.2)
    house = build()
    (greedy,) = publish(house, 1)
    hers = house.tenant
    house.be("bob")
    (his,) = publish(house, 1)
    worker = house.worker()
    settle(worker)
    bobs = house.tenant

    def ask(number: int) -> OpRow:
        house.tenant = hers
        return house.sample(greedy, number)

    ask(1)
    worker.step()
    house.tenant = bobs
    op = house.sample(his, 1)
    number, until = 1, time.monotonic() + 60
    while not house.store.ops.get(bobs, op.id).state.is_final and time.monotonic() < until:
        number += 1
        ask(number)
        worker._must_look = True
        worker.step()
    assert house.store.ops.get(bobs, op.id).state is OpState.DONE
    settle(worker)
