"""What the next pass takes is read and decoded while this one computes; nothing is decided by it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.house import House, settle
from tinsmith.fake_engine import FakePass
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId, OpState, RunId, TrainItem
from tinsmith.worker import decode_ahead
from tinsmith.worker.decode import Payloads
from tinsmith.worker.loop import Worker

SECONDS = 30.0
TOKENS = [1, 2, 3]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, inline_bytes=64, **settings)))

        yield make


@pytest.fixture
def decoded_on(monkeypatch: pytest.MonkeyPatch) -> dict[OpId, list[str]]:
    """On which threads each op's payload was decoded."""
    threads: dict[OpId, list[str]] = {}
    train_item = Payloads.train_item

    def watched(self: Payloads, op: OpRow) -> TrainItem:
        item = train_item(self, op)
        threads.setdefault(op.id, []).append(threading.current_thread().name.partition("_")[0])
        return item

    monkeypatch.setattr(Payloads, "train_item", watched)
    return threads


def ready(house: House, *, num_runs: int = 1) -> tuple[Worker, list[RunId]]:
    runs = [house.create_run(seed=seed) for seed in range(num_runs)]
    worker = house.worker()
    settle(worker)
    return worker, runs


def wait_until_read(worker: Worker, op: OpRow) -> None:
    end = time.monotonic() + SECONDS
    future = worker._decoded._asked.get(op.id)
    while future is not None and not future.done():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_next_pass_is_decoded_while_this_one_computes(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, decoded_on: dict[OpId, list[str]]
) -> None:
    alone, house = build("alone", pass_max_tokens=3), build(pass_max_tokens=3)
    (expected,) = ready(alone)[1]
    expected_ops = [alone.forward_backward(expected, seq, TOKENS) for seq in (1, 2, 3)]
    settle(alone.worker())
    worker, (run,) = ready(house)
    ops = [house.forward_backward(run, seq, TOKENS) for seq in (1, 2, 3)]
    computing = FakePass.advance
    at_work: list[list[str]] = []

    def advance(self: FakePass, max_work: int) -> Any:
        for op in ops:
            wait_until_read(worker, op)
        at_work.append([op.id for op in ops if op.id in decoded_on])
        return computing(self, max_work)

    decoded_on.clear()
    monkeypatch.setattr(FakePass, "advance", advance)
    settle(worker)
    assert [len(seen) for seen in at_work] == [2, 3, 3], "one pass ahead, and no further"
    assert [decoded_on[op.id] for op in ops] == [["MainThread"], ["decode"], ["decode"]]
    assert [house.result(op) for op in ops] == [alone.result(op) for op in expected_ops]


def test_what_was_decoded_is_not_claimed(build: Callable[..., House], decoded_on: dict[OpId, list[str]]) -> None:
    """A worker that dies then has tried what it computed, and nothing else."""
    house = build(pass_max_tokens=3)
    worker, (run,) = ready(house)
    first, second = (house.forward_backward(run, seq, TOKENS) for seq in (1, 2))
    worker._must_look = True
    worker.step()
    wait_until_read(worker, second)
    assert decoded_on[second.id] == ["decode"]
    assert [(house.get(op).state, house.get(op).attempts) for op in (first, second)] == [
        (OpState.DONE, 1),
        (OpState.QUEUED, 0),
    ]
    settle(house.worker())
    assert house.get(second).attempts == 1


def test_no_more_is_read_than_one_pass_takes_and_what_left_the_queue_is_forgotten(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    worker, runs = ready(house, num_runs=6)
    ops = [house.forward_backward(run, 1, TOKENS) for run in runs]
    ahead = worker._decoded
    ahead.want(ops, 9)
    assert list(ahead._asked) == [op.id for op in ops[:3]]
    monkeypatch.setattr(decode_ahead, "MAX_BYTES", 2 * ops[0].payload_bytes)
    ahead.want(ops[1:], 100)
    assert list(ahead._asked) == [op.id for op in ops[1:3]]
    assert ahead.take(ops[0]) is None
    item = ahead.take(ops[1])
    assert item is None or item.op_id == ops[1].id
    monkeypatch.setattr(decode_ahead, "MAX_BYTES", 1)
    ahead.want(ops[4:], 1)
    assert list(ahead._asked) == [ops[4].id], "a single one may be larger"
    ahead.close()


def test_a_payload_that_is_gone_fails_its_request_as_it_does_without_a_thread(build: Callable[..., House]) -> None:
    house = build(pass_max_tokens=3)
    worker, (run,) = ready(house)
    first, second = (house.forward_backward(run, seq, TOKENS) for seq in (1, 2))
    assert second.payload_blob is not None
    house.blobs.delete(second.payload_blob)
    settle(worker)
    assert house.get(first).state is OpState.DONE
    failure = house.get(second).failure
    assert failure is not None
    assert failure.code == "not_found"


def test_small_payloads_come_with_the_claim(tmp_path: Path) -> None:
    with contextlib.closing(House(tmp_path / "house", pass_max_tokens=3)) as house:
        worker, (run,) = ready(house)
        ops = [house.forward_backward(run, seq, TOKENS) for seq in (1, 2)]
        worker._decoded.want(ops, 100)
        assert not worker._decoded._asked
