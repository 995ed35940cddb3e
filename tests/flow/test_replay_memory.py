"""Replays for which there is no memory: the run waits and comes back, and nothing of it is given up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flow.house import House, settle
from tinsmith.errors import NoMemoryError
from tinsmith.store.rows import OpRow
from tinsmith.types import Failure, OpState, RunId, RunStatus
from tinsmith.worker import postponed

NO_MEMORY = "there is not enough memory for a sequence of 3 tokens"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., House]]:
    monkeypatch.setattr(postponed, "FIRST_RETRY_S", 0.0)
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


def trained(house: House) -> RunId:
    """A run with a log: two passes that share their gradients, and a step; twice."""
    run = house.create_run()
    for seq in (1, 4):
        house.forward_backward(run, seq, [seq, 2, 3])
        house.forward_backward(run, seq + 1, [7, seq])
        house.optim_step(run, seq + 2)
    settle(house.worker())
    return run


def expected(build: Callable[..., House]) -> Any:
    house = build("undisturbed")
    run = trained(house)
    house.forward_backward(run, 7, [5])
    settle(house.worker())
    return house.state(run).tensors


def lack(monkeypatch: pytest.MonkeyPatch, house: House, place: str, run: RunId, times: int) -> list[str]:
    """The run finds no memory at one place of the engine, so many times. What was refused is in the list."""
    refused: list[str] = []

    def is_of_run(first: Any) -> bool:
        items = first if isinstance(first, list) else [first]
        return any(one.run_id == run for one in items)

    call = getattr(house.engine, place)

    def short(first: Any, *args: Any, **options: Any) -> Any:
        if len(refused) < times and is_of_run(first):
            refused.append(place)
            if place == "apply":
                return Failure("out_of_memory", "user", NO_MEMORY)
            raise NoMemoryError(NO_MEMORY)
        return call(first, *args, **options)

    monkeypatch.setattr(house.engine, place, short)
    return refused


PLACES = ["create_run", "start_pass", "apply", "optim_step"]


@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("place", PLACES)
def test_a_replay_without_memory_is_computed_later(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, place: str, times: int
) -> None:
    """Requests that came meanwhile wait for it; those of another run don't."""
    house = build()
    run, other = trained(house), house.create_run(seed=2)
    worker = house.worker()
    refused = lack(monkeypatch, house, place, run, times)
    late, fine = house.forward_backward(run, 7, [5]), house.forward_backward(other, 1, [5])
    settle(worker)
    assert len(refused) == times
    assert [house.get(op).state for op in (late, fine)] == [OpState.DONE, OpState.DONE]
    assert house.store.runs.get(house.tenant, run).status is RunStatus.READY
    whole = expected(build)
    for name, tensor in house.state(run).tensors.items():
        np.testing.assert_array_equal(tensor, whole[name], err_msg=name)


def test_a_snapshot_without_memory_is_not_taken_for_damaged(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request finds no room for its run's state: it fails, to be sent again, and the run is as it was."""
    house = build(snapshot_debt_bytes=1)
    run = trained(house)
    worker = house.worker()
    lack(monkeypatch, house, "import_run", run, 1)
    refused = house.forward_backward(run, 7, [5])
    settle(worker)
    failure = house.get(refused).failure
    assert failure is not None
    assert (failure.code, failure.category) == ("no_memory", "capacity")
    again = house.forward_backward(run, 8, [5])
    settle(worker)
    assert house.get(again).state is OpState.DONE
    whole = expected(build)
    for name, tensor in house.state(run).tensors.items():
        np.testing.assert_array_equal(tensor, whole[name], err_msg=name)


def test_requests_do_not_wait_for_memory_for_ever(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail, to be sent again; the run stays, and is there once there is memory."""
    monkeypatch.setattr(postponed, "PATIENCE_S", 0.0)
    house = build()
    run = trained(house)
    worker = house.worker()
    refused = lack(monkeypatch, house, "apply", run, 3)
    late = [house.forward_backward(run, 7, [5]), house.optim_step(run, 8)]
    settle(worker)
    assert len(refused) == 3
    for op in late:
        failure = house.get(op).failure
        assert failure is not None
        assert (failure.code, failure.category) == ("no_memory", "capacity")
        assert "again" in failure.message
    again = house.forward_backward(run, 9, [5])
    settle(worker)
    assert house.get(again).state is OpState.DONE
    whole = expected(build)
    for name, tensor in house.state(run).tensors.items():
        np.testing.assert_array_equal(tensor, whole[name], err_msg=name)


def test_a_run_that_waits_for_memory_is_not_tried_all_the_time(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postponed, "FIRST_RETRY_S", 3600.0)
    house = build()
    run = trained(house)
    worker = house.worker()
    refused = lack(monkeypatch, house, "apply", run, 10**6)
    late = house.forward_backward(run, 7, [5])
    for _ in range(3):
        settle(worker)
    assert len(refused) <= 2  # one for each of the two that share their pass
    assert house.get(late).state is OpState.QUEUED
    assert house.store.runs.get(house.tenant, run).status is RunStatus.READY


def test_a_live_step_without_memory_fails_and_changes_nothing(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    run = trained(house)
    worker = house.worker()
    house.forward_backward(run, 7, [5])
    settle(worker)
    before = house.state(run).tensors
    step, shortages = house.engine.optim_step, iter([NoMemoryError(NO_MEMORY)])

    def half(items: Any) -> Any:
        outcomes = step(items)
        for shortage in shortages:
            raise shortage
        return outcomes

    monkeypatch.setattr(house.engine, "optim_step", half)
    op = house.optim_step(run, 8)
    settle(worker)
    failure = house.get(op).failure
    assert failure is not None
    assert (failure.code, failure.category) == ("no_memory", "capacity")
    house.forward_backward(run, 9, [1], forward_only=True)
    settle(worker)
    for name, tensor in house.state(run).tensors.items():
        np.testing.assert_array_equal(tensor, before[name], err_msg=name)


@pytest.mark.parametrize("end", ["given back", "given up"])
def test_a_wait_ends_with_the_hold_on_the_run(build: Callable[..., House], end: str) -> None:
    """A later lack of memory is another wait, whose requests have their minute again."""
    house = build()
    run = house.create_run()
    op = house.forward_backward(run, 1, [1, 2])
    worker = house.worker()
    settle(worker)
    worker.runs.postponed.add(run, op, Failure("no_memory", "server", NO_MEMORY))
    if end == "given back":
        worker.runs._release([run])
    else:
        worker.runs._give_up(worker.runs[run], "its file is gone")
    assert not worker.runs.postponed._waits


def test_a_process_that_runs_out_outside_of_the_engine_blames_no_request(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While payloads are read: a new request is told so, a replay is computed later."""
    house = build()
    run = trained(house)
    worker = house.worker()
    read, refused = worker._payloads.train_item, []

    def runs_out(op: OpRow) -> Any:
        if len(refused) < 2:
            refused.append(op.seq_id)
            raise MemoryError
        return read(op)

    monkeypatch.setattr(worker._payloads, "train_item", runs_out)
    monkeypatch.setattr(worker._decoded, "take", lambda op: None)
    late = house.forward_backward(run, 7, [5])
    settle(worker)
    assert len(refused) == 2
    assert house.get(late).state is OpState.DONE
    assert house.store.runs.get(house.tenant, run).status is RunStatus.READY
    refused.clear()
    alone = house.forward_backward(run, 8, [5])
    refused.append(0)
    settle(worker)
    failure = house.get(alone).failure
    assert failure is not None
    assert failure.code == "no_memory"
