"""Outcomes recorded beside the loop: in order, bounded, before all that builds on them, and never lost in silence."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flow.house import House, settle, train
from tinsmith.errors import CorruptError, FencedError
from tinsmith.files.blobs import Blobs
from tinsmith.store.rows import Finished, OpRow, WorkerId
from tinsmith.types import OpId, OpKind, OpState, SamplerId
from tinsmith.wire.training import encode_train_result
from tinsmith.worker import passes, recorder
from tinsmith.worker.loop import Worker

SECONDS = 30.0


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


class Gate:
    """Stands in the place of `store.ops.finish`: transactions are noted, and wait while it is closed."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[OpId]] = []
        self.threads: set[str] = set()
        self.error: Exception | None = None
        self._is_open = threading.Event()
        self._finish = house.store.ops.finish
        monkeypatch.setattr(house.store.ops, "finish", self._pass)

    def open(self) -> None:
        self._is_open.set()

    def _pass(self, me: WorkerId, finished: Sequence[Finished], now: float) -> list[OpId]:
        assert self._is_open.wait(SECONDS)
        if self.error is not None:
            raise self.error
        self.threads.add(threading.current_thread().name)
        new = self._finish(me, finished, now)
        self.groups.append([one.op_id for one in finished])
        return new


def until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not is_true():
        assert time.monotonic() < end, "it didn't come to that"
        time.sleep(0.002)


def turn(worker: Worker, is_true: Callable[[], bool]) -> None:
    """Step until it is so."""

    def stepped() -> bool:
        worker._must_look = True
        worker.step()
        return is_true()

    until(stepped)


@contextlib.contextmanager
def at_work(worker: Worker) -> Iterator[list[BaseException]]:
    """The worker runs on a thread of its own; what it ended with."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            worker.run(stop)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join()


def test_outcomes_are_those_of_a_loop_that_records_by_itself_and_in_its_order(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, house = build("alone"), build()
    expected = [alone.create_run(seed=seed) for seed in range(3)]
    expected_ops = [train(alone, run, range(4)) for run in expected]
    settle(alone.worker())
    gate = Gate(house, monkeypatch)
    gate.open()
    runs = [house.create_run(seed=seed) for seed in range(3)]
    ops = [train(house, run, range(4)) for run in runs]
    with at_work(house.worker()) as errors:
        until(lambda: all(house.get(op).state.is_final for own in ops for op in own))
    assert not errors
    assert "recorder" in gate.threads
    recorded = [op_id for group in gate.groups for op_id in group]
    for own, expected_own in zip(ops, expected_ops, strict=True):
        assert [op_id for op_id in recorded if op_id in {op.id for op in own}] == [op.id for op in own]
        assert [house.result(op) for op in own] == [alone.result(op) for op in expected_own]
    for run, expected_run in zip(runs, expected, strict=True):
        np.testing.assert_array_equal(house.weights(run), alone.weights(expected_run))


def test_what_waits_while_a_transaction_is_written_shares_the_next(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    gate = Gate(house, monkeypatch)
    worker = house.worker()
    worker._recorder.start(worker._wake)
    ops = train(house, house.create_run(), range(4))
    turn(worker, lambda: worker._recorder.mark() == len(ops) + 1)
    gate.open()
    settle(worker)
    worker._recorder.stop()
    assert len(gate.groups) < len(ops)
    assert all(house.get(op).state is OpState.DONE for op in ops)


@pytest.mark.parametrize("bound", ["MAX_WAITING", "MAX_WAITING_BYTES"])
def test_the_loop_waits_once_too_much_is_not_recorded(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    most = 4 if bound == "MAX_WAITING" else 400
    monkeypatch.setattr(recorder, bound, most)
    house = build()
    gate = Gate(house, monkeypatch)
    ops = train(house, house.create_run(), range(12))
    worker = house.worker()
    with at_work(worker) as errors:
        until(lambda: worker._recorder.mark() >= 3)
        time.sleep(0.2)
        given = worker._recorder.mark()
        assert given < len(ops), "the loop went on"
        assert (given if bound == "MAX_WAITING" else worker._recorder._num_bytes) <= most
        gate.open()
        until(lambda: all(house.get(op).state is OpState.DONE for op in ops))
    assert worker._recorder._num_bytes == 0
    assert not errors


@pytest.mark.parametrize("error", [FencedError("replaced"), CorruptError("the disk is gone"), ValueError("a bug")])
def test_a_failure_to_record_ends_the_worker_and_the_next_computes_the_same(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(recorder, "STORAGE_PATIENCE_S", 0.0)
    alone, house = build("alone"), build()
    expected = alone.create_run()
    expected_ops = train(alone, expected, range(3))
    settle(alone.worker())
    run = house.create_run()
    settle(house.worker())
    with pytest.MonkeyPatch.context() as patched:
        gate = Gate(house, patched)
        gate.error = error
        gate.open()
        ops = train(house, run, range(3))
        with at_work(house.worker()) as errors:
            until(lambda: bool(errors))
    assert errors == [error]
    assert not any(house.get(op).state.is_final for op in ops)
    settle(house.worker())
    assert [house.result(op) for op in ops] == [alone.result(op) for op in expected_ops]
    np.testing.assert_array_equal(house.weights(run), alone.weights(expected))


def test_a_result_of_training_that_can_not_be_written_is_computed_again(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its effect is in the run's state by then, so it may not fail alone."""
    alone, house = build("alone"), build()
    expected = alone.create_run()
    expected_ops = train(alone, expected, range(2))
    settle(alone.worker())
    run = house.create_run()
    settle(house.worker())
    failures = [MemoryError()]

    def encode(result: Any) -> bytes:
        if failures:
            raise failures.pop()
        return encode_train_result(result)

    monkeypatch.setattr(passes, "encode_train_result", encode)
    ops = train(house, run, range(2))
    with at_work(house.worker()) as errors:
        until(lambda: bool(errors))
    assert isinstance(errors[0], MemoryError)
    settle(house.worker())
    assert [house.result(op) for op in ops] == [alone.result(op) for op in expected_ops]
    np.testing.assert_array_equal(house.weights(run), alone.weights(expected))


def test_a_death_between_computing_and_recording_loses_and_repeats_nothing(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With snapshots as often as can be: none may hold what isn't recorded."""
    alone, house = build("alone"), build(snapshot_debt_bytes=1)
    expected = alone.create_run()
    expected_ops = train(alone, expected, range(4))
    settle(alone.worker())
    run = house.create_run()
    settle(house.worker())
    before = house.store.runs.get(house.tenant, run).snapshot_seq
    ops = train(house, run, range(4))
    with pytest.MonkeyPatch.context() as patched:
        Gate(house, patched)
        dead = house.worker()
        dead._recorder.start(dead._wake)
        turn(dead, lambda: dead.runs[run].applied_seq >= 6)
        dead.runs.snapshot_due()
        time.sleep(0.05)
        assert house.store.runs.get(house.tenant, run).snapshot_seq == before
        dead._recorder._waiting.clear()  # as if it had died here
        replaced = FencedError("replaced")
        dead._recorder._fail(replaced)
    settle(house.worker())
    assert [house.result(op) for op in ops] == [alone.result(op) for op in expected_ops]
    np.testing.assert_array_equal(house.weights(run), alone.weights(expected))


def test_the_file_of_a_sampler_is_recorded_after_the_sampler(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    run = house.create_run()
    settle(house.worker())
    gate = Gate(house, monkeypatch)
    worker = house.worker()
    worker._recorder.start(worker._wake)
    sampler_id = SamplerId(f"{house.session}:sample:0")
    saved = house.save_sampler(run, 1, sampler_id)
    stepped = house.optim_step(run, 2)  # so that the loop has more to do, and doesn't record by itself
    written: list[str] = []
    put = Blobs.put
    monkeypatch.setattr(Blobs, "put", lambda self, key, body: (put(self, key, body), written.append(key))[0])
    turn(worker, lambda: bool(written))
    time.sleep(0.05)
    assert worker._writer.num_pending == 1
    gate.open()
    settle(worker)
    worker._recorder.stop()
    assert [house.get(op).state for op in (saved, stepped)] == [OpState.DONE] * 2
    assert house.store.samplers.get_any(sampler_id).promised_seq is None


def test_a_run_is_given_back_after_its_outcomes(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next holder reads its log: an op computed here and missing there would be missing for ever."""
    house = build()
    run = house.create_run()
    settle(house.worker())
    gate = Gate(house, monkeypatch)
    worker = house.worker()
    worker._recorder.start(worker._wake)
    first, second = house.forward_backward(run, 1, [1, 2, 3]), house.optim_step(run, 2)
    turn(worker, lambda: worker._recorder.mark() >= 1)
    threading.Timer(0.1, gate.open).start()
    worker.runs._release([run])
    assert house.get(first).state is OpState.DONE
    worker._recorder.stop()
    settle(house.worker())
    assert house.get(second).state is OpState.DONE


def test_a_lone_request_is_recorded_without_a_hand_over(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    gate = Gate(house, monkeypatch)
    gate.open()
    worker = house.worker()
    worker._recorder.start(worker._wake)
    run = house.create_run()
    settle(worker)
    op = house.enqueue(house.op(OpKind.OPTIM_STEP, run, 1, payload=b'{"adam_params": {}}'))
    settle(worker)
    worker._recorder.stop()
    assert house.get(op).state is OpState.DONE
    assert gate.threads == {threading.main_thread().name}


def test_a_clean_stop_records_all(build: Callable[..., House]) -> None:
    house = build()
    run = house.create_run()
    ops = train(house, run, range(8))
    with at_work(house.worker()) as errors:
        until(lambda: house.get(ops[3]).state.is_final)
    assert not errors
    assert not any(house.get(op).state is OpState.RUNNING for op in ops)


def test_the_next_is_claimed_before_the_last_is_recorded(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim would wait for the other transaction, and the engine for the claim."""
    monkeypatch.setattr(recorder, "MOST_HELD_S", SECONDS)
    house = build()
    run = house.create_run()
    settle(house.worker())
    gate = Gate(house, monkeypatch)
    gate.open()
    claimed_after: dict[OpId, int] = {}
    claim = house.store.ops.claim

    def watched(me: WorkerId, op_ids: Sequence[OpId], now: float) -> list[OpRow]:
        claimed_after.update(dict.fromkeys(op_ids, sum(map(len, gate.groups))))
        return claim(me, op_ids, now)

    monkeypatch.setattr(house.store.ops, "claim", watched)
    ops = train(house, run, range(2))
    worker = house.worker()
    worker._recorder.start(worker._wake)
    settle(worker)
    worker._recorder.stop()
    assert [claimed_after[op.id] for op in ops[:3]] == [0, 0, 0]
    assert all(house.get(op).state is OpState.DONE for op in ops)


def test_what_was_computed_is_recorded_soon_though_the_loop_never_says_so(build: Callable[..., House]) -> None:
    house = build()
    worker = house.worker()
    worker._recorder.start(worker._wake)
    run = house.create_run()
    ops = train(house, run, range(1))
    turn(worker, lambda: worker._recorder.mark() > 0)
    until(lambda: worker._recorder._num_recorded > 0)
    settle(worker)
    worker._recorder.stop()
    assert all(house.get(op).state is OpState.DONE for op in ops)
