"""Runs in memory as a cache: bounds in number and bytes, states read ahead and written behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flow.house import House, settle
from tinsmith.fake_engine import FakeEngine
from tinsmith.files.blobs import Blobs
from tinsmith.types import OpState, RunId
from tinsmith.worker import residency
from tinsmith.worker.readahead import ReadAhead

MIB_RANK = 2**20 // 16  # of a run that takes a MiB in the fake engine


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


def train(house: House, run: RunId, seq: int, token: int = 2) -> None:
    house.forward_backward(run, seq, [token, 3])
    house.optim_step(run, seq + 1)


def watch(house: House, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of all runs each time that one comes into the engine."""
    seen: list[int] = []
    for name in ("create_run", "import_run"):
        call = getattr(FakeEngine, name)

        def count(self: FakeEngine, *args: Any, _call: Any = call, **options: Any) -> None:
            _call(self, *args, **options)
            seen.append(self.runs_bytes)

        monkeypatch.setattr(FakeEngine, name, count)
    return seen


@pytest.mark.parametrize("limits", [{"resident_runs_mib": 4}, {"max_resident_runs": 4}])
def test_the_bound_holds_while_many_runs_take_turns(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """Also where every run has more requests waiting, so that none is idle: they leave in turns."""
    monkeypatch.setattr(residency, "MIN_STAY_S", 0.0)
    house = build(**limits)
    seen = watch(house, monkeypatch)
    runs = [house.create_run(rank=MIB_RANK, seed=seed) for seed in range(12)]
    for turn in range(3):
        for run in runs:
            train(house, run, 2 * turn + 1, turn)
    settle(house.worker())
    assert max(seen) <= 4 * 2**20
    assert len(seen) > len(runs)
    one = build("alone")
    alone = one.create_run(rank=MIB_RANK, seed=5)
    for turn in range(3):
        train(one, alone, 2 * turn + 1, turn)
    settle(one.worker())
    house.forward_backward(runs[5], 7, [1], forward_only=True)
    settle(house.worker())
    np.testing.assert_array_equal(house.weights(runs[5]), one.weights(alone))


def test_a_run_larger_than_the_bound_is_served_alone(build: Callable[..., House]) -> None:
    house = build(resident_runs_mib=1)
    run = house.create_run(rank=3 * MIB_RANK)
    train(house, run, 1)
    op = house.forward_backward(run, 3, [1])
    settle(house.worker())
    assert house.get(op).state is OpState.DONE


@pytest.mark.parametrize("rank", [4, 3 * MIB_RANK])
def test_a_run_that_is_never_idle_does_not_hold_its_place_for_ever(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Small or larger than all memory for runs, with a request under way whenever the worker looks."""
    monkeypatch.setattr(residency, "TURN_S", 0.2)
    house = build(max_resident_runs=1, resident_runs_mib=1)
    greedy = house.create_run(rank=rank)
    worker = house.worker()
    settle(worker)
    hers = house.tenant
    house.be("bob")
    op = house.forward_backward(house.create_run(), 1, [1])
    bobs, house.tenant = house.tenant, hers
    seq, until = 0, time.monotonic() + 60
    while not house.store.ops.get(bobs, op.id).state.is_final and time.monotonic() < until:
        seq += 1
        house.forward_backward(greedy, seq, [1, 2])
        worker._must_look = seq > 2
        worker.step()
    assert house.store.ops.get(bobs, op.id).state is OpState.DONE
    settle(worker)


def test_others_work_while_a_state_is_read(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    house = build(snapshot_debt_bytes=1)
    cold, warm = house.create_run(seed=1), house.create_run(seed=2)
    train(house, cold, 1)
    settle(house.worker())
    house.worker().close()
    go_on, load = threading.Event(), Blobs.load

    def waits(self: Blobs, key: Any, read: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread(), "the loop waited for the disk"
        assert go_on.wait(30)
        return load(self, key, read)

    worker = house.worker()
    train(house, warm, 1)
    settle(worker)
    monkeypatch.setattr(Blobs, "load", waits)
    late = house.forward_backward(cold, 3, [1])
    soon = [house.forward_backward(warm, seq, [1]) for seq in (3, 4)]
    for _ in range(50):
        worker._must_look = True
        worker.step()
    assert [house.get(op).state for op in soon] == [OpState.DONE, OpState.DONE]
    assert house.get(late).state is OpState.QUEUED
    go_on.set()
    settle(worker)
    assert house.get(late).state is OpState.DONE


def test_a_run_on_its_way_out_is_not_touched(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are written without a copy; a request that comes meanwhile waits for the end of the writing."""
    house = build(max_resident_runs=1)
    first, second = house.create_run(seed=1), house.create_run(seed=2)
    worker = house.worker()
    train(house, first, 1)
    settle(worker)
    go_on, put = threading.Event(), Blobs.put

    def waits(self: Blobs, key: Any, data: Any) -> Any:
        assert "snapshots" not in key or go_on.wait(30)
        return put(self, key, data)

    monkeypatch.setattr(Blobs, "put", waits)
    train(house, second, 1)
    for _ in range(20):
        worker._must_look = True
        worker.step()
    late = house.forward_backward(first, 3, [9])
    for _ in range(20):
        worker._must_look = True
        worker.step()
    assert house.get(late).state is OpState.QUEUED
    go_on.set()
    settle(worker)
    assert house.get(late).state is OpState.DONE


def test_states_come_back_from_host_memory_where_the_engine_has_its_own(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "is_on_host", False)
    house = build(max_resident_runs=1)
    runs = [house.create_run(seed=seed) for seed in range(3)]
    for run in runs:
        train(house, run, 1)
    worker = house.worker()
    settle(worker)
    monkeypatch.setattr(Blobs, "load", None)
    ops = [house.forward_backward(run, 3, [1]) for run in runs[:2]]
    settle(worker)
    assert [house.get(op).state for op in ops] == [OpState.DONE, OpState.DONE]


def test_what_is_read_ahead_stays_within_its_bound(tmp_path: Path) -> None:
    house = House(tmp_path)
    try:
        runs = [house.create_run(rank=1000, seed=seed) for seed in range(6)]
        for run in runs:
            train(house, run, 1)
        house.worker()
        worker = house.worker()
        settle(worker)
        worker.close()
        keys = [house.store.runs.get(house.tenant, run).snapshot_blob for run in runs]
        ahead = ReadAhead(house.blobs, house.engine.host_row, 40_000, lambda: None)
        for key in keys:
            assert key is not None
            ahead.want(key)
        until = time.monotonic() + 10
        while ahead.num_pending and time.monotonic() < until:
            time.sleep(0.01)
        assert 0 < ahead.num_bytes <= 40_000
        assert ahead.want(keys[0])
        assert not ahead.want(keys[5])
        ahead.take(keys[0])
        ahead.take(keys[1])
        assert not ahead.want(keys[5])
        assert ahead.take(keys[5]).tensors
        ahead.close()
    finally:
        house.close()


def test_thousands_of_idle_runs_cost_the_loop_nothing(build: Callable[..., House]) -> None:
    """Runs that are leased and idle are looked at in no turn."""
    house = build(max_resident_runs=4)
    for seed in range(60):
        run = house.create_run(seed=seed)
        train(house, run, 1)
    worker = house.worker()
    settle(worker)
    touched: list[str] = []

    class Watched(dict[RunId, Any]):
        def values(self) -> Any:
            touched.append("values")
            return super().values()

        def items(self) -> Any:
            touched.append("items")
            return super().items()

    worker.runs._held = Watched(worker.runs._held)
    train(house, run, 3)
    settle(worker)
    assert not touched


def test_requests_of_a_run_that_was_given_back_meanwhile_are_not_planned(build: Callable[..., House]) -> None:
    """It left memory with a request in the queue's view, and another worker took it before this one looked again."""
    house = build(scan_interval_s=60.0)
    run = house.create_run()
    first = house.worker("fake/base#0")
    settle(first)
    second = house.worker("fake/base#1")
    settle(second)
    op = house.forward_backward(run, 1, [1, 2])
    first._queue.look()
    first.runs.residency.drop(run)
    first.runs._release([run])
    settle(second)
    assert house.get(op).state is OpState.DONE
    assert op.id in {seen.id for seen in first._queue.ops}
    first._must_look = True
    first.step()
    settle(first)
    late = house.forward_backward(run, 2, [1, 2])
    settle(second)
    assert house.get(late).state is OpState.DONE
