"""Two workers of one base: each holds runs of its own, either takes over the other's, and a late one writes nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.flow.house import BASE, House, settle, train
from tinsmith.engine import Engine
from tinsmith.errors import FencedError
from tinsmith.fake_engine import MODULE
from tinsmith.store.rows import Finished
from tinsmith.types import BlobKey, FloatArray, OpState, RunId, SamplerId
from tinsmith.worker.loop import Worker

A, B = "0", "0-2"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "house")) as house:
        yield house


def ready(house: House, slot: str) -> Worker:
    worker = house.worker(slot)
    house.store.workers.set_ready(worker._me)
    return worker


def engine(worker: Worker) -> Engine:
    return worker._engine


def param(worker: Worker, run: RunId) -> FloatArray:
    return engine(worker).export_run(run).tensors[f"param/{MODULE}"]


def holders(house: House, runs: list[RunId]) -> dict[str | None, int]:
    owners = [house.store.runs.get(house.tenant, run).lease_owner for run in runs]
    return {owner: owners.count(owner) for owner in owners}


def expected(tmp_path: Path, steps: int) -> FloatArray:
    with contextlib.closing(House(tmp_path / f"quiet{steps}")) as quiet:
        run = quiet.create_run()
        train(quiet, run, range(steps))
        settle(quiet.worker())
        return quiet.weights(run)


def test_runs_go_to_the_one_that_has_fewer(house: House) -> None:
    first, second = ready(house, A), ready(house, B)
    runs = [house.create_run() for _ in range(8)]
    settle(first)
    assert holders(house, runs) == {A: 4, None: 4}, "half is left to the other"
    settle(second)
    assert holders(house, runs) == {A: 4, B: 4}
    more = [house.create_run() for _ in range(2)]
    settle(second)
    settle(first)
    assert holders(house, runs + more) == {A: 5, B: 5}
    ops = [op for run in runs + more for op in train(house, run, range(2))]
    for worker in (first, second):
        settle(worker)
    assert {house.get(op).state for op in ops} == {OpState.DONE}
    assert {house.get(op).owner for op in ops} == {A, B}


def test_a_run_that_nobody_takes_is_not_left_waiting(house: House) -> None:
    first, _ = ready(house, A), ready(house, B)
    runs = [house.create_run() for _ in range(4)]
    settle(first)
    late = house.store.runs.lease(first._me, BASE.name, 10, now=time.time() + 5.0)
    assert len(late) == 2
    assert holders(house, runs) == {A: 4}


def test_where_the_other_is_gone_all_runs_are_taken_over_and_go_on(house: House, tmp_path: Path) -> None:
    first, second = ready(house, A), ready(house, B)
    runs = [house.create_run() for _ in range(6)]
    for worker in (first, second):
        settle(worker)
    for run in runs:
        train(house, run, range(2))
    for worker in (first, second):
        settle(worker)
    house.store.workers.vacate(A)
    for run in runs:
        train(house, run, range(2, 4))
    settle(second)
    assert holders(house, runs) == {B: 6}
    right = expected(tmp_path, 4)
    for run in runs:
        np.testing.assert_array_equal(param(second, run), right)


@pytest.mark.parametrize("has_computed", [False, True])
def test_one_that_was_paused_beyond_its_lease_writes_nothing_when_it_comes_back(
    house: House, tmp_path: Path, has_computed: bool
) -> None:
    """Paused with claimed ops before it computed them, or with outcomes that it had not recorded yet."""
    first = ready(house, A)
    run = house.create_run()
    settle(first)
    ops = train(house, run, range(2))
    record, late = first._recorder.record, []
    first._recorder.record = lambda outcomes, **_: late.append(outcomes)  # type: ignore[method-assign]
    if has_computed:
        step(first)
        assert late
    else:
        first._claims.take_queued([ops[0].id])
    paused_state = param(first, run)
    second = ready(house, B)
    house.store.workers.renew(first._me, -1.0, time.time())  # its lease runs out
    settle(second)
    seen = [house.result(op) for op in ops]
    assert {house.get(op).owner for op in ops} == {B}

    for outcomes in late:
        with pytest.raises(FencedError):
            record(outcomes, at_once=True)
    with pytest.raises(FencedError):
        house.store.ops.finish(first._me, [Finished(op.id, OpState.DONE, result=b"another") for op in ops], time.time())
    with pytest.raises(FencedError):
        house.store.runs.record_snapshot(first._me, run, 9, BlobKey("x"), 1, time.time())
    with pytest.raises(FencedError):
        house.store.workers.renew(first._me, 10.0, time.time())
    train(house, run, range(2, 3))
    step(first)
    settle(second)
    assert [house.result(op) for op in ops] == seen
    np.testing.assert_array_equal(param(second, run), expected(tmp_path, 3))
    if has_computed:
        assert not np.array_equal(paused_state, param(second, run))


def step(worker: Worker) -> None:
    for _ in range(20):
        worker._must_look = True
        worker.step()


def test_samples_are_shared(tmp_path: Path) -> None:
    with contextlib.closing(House(tmp_path / "shared", workers_per_base=2)) as house:
        first, second = ready(house, A), ready(house, B)
        sampler = house.sampler()
        ops = [house.sample(sampler, number, max_tokens=200) for number in range(8)]
        for worker in (first, second, first, second):
            worker._must_look = True
            worker.step()
        assert first._engine.num_samples >= 4
        assert second._engine.num_samples >= 2
        for worker in (first, second):
            settle(worker)
        assert {house.get(op).state for op in ops} == {OpState.DONE}


def test_a_sample_waits_for_weights_that_the_other_has_not_written_yet(house: House) -> None:
    first, second = ready(house, A), ready(house, B)
    run = house.create_run()
    settle(first)
    sampler = SamplerId(f"{house.session}:sample:7")
    house.save_sampler(run, 1, sampler)
    first._publisher.write = lambda: None  # type: ignore[method-assign]
    step(first)
    op = house.sample(sampler, 0)
    step(second)
    assert house.get(op).state is OpState.QUEUED
    del first._publisher.write
    settle(first)
    assert house.get(op).state is OpState.DONE
    other = house.sample(sampler, 1)
    settle(second)
    assert house.get(other).owner == B
    assert len(house.result(other)) == len(house.result(op))
