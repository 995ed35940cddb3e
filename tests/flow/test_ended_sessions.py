"""What a session held is free once it has ended; what it had sent to train is carried out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.house import House, settle, train
from tinsmith.types import OpState
from tinsmith.upkeep.janitor import sweep
from tinsmith.worker import residency


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(residency, "ENDED_CHECK_S", 0.0)
    with contextlib.closing(House(tmp_path, session_timeout_s=60.0)) as house:
        yield house


def expire(house: House) -> None:
    assert sweep(house.store, house.blobs, house.settings, time.time() + 61).num_sessions == 1


def test_training_that_was_acknowledged_is_carried_out_and_then_the_run_leaves_memory(house: House) -> None:
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    ops = train(house, run, range(2))
    expire(house)
    settle(worker)
    settle(worker)  # its state was on the way to the disk
    assert [house.get(op).state for op in ops] == [OpState.DONE] * 4
    assert not house.engine.has_run(run)
    assert house.store.runs.get(house.tenant, run).snapshot_seq == 4


def test_a_run_whose_session_has_ended_goes_on_where_it_was(house: House) -> None:
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    train(house, run, range(2))
    settle(worker)
    before = house.weights(run)
    expire(house)
    settle(worker)
    settle(worker)
    assert not house.engine.has_run(run)
    op = house.forward_backward(run, 5, [1, 2, 3])
    house.store.runs.get(house.tenant, run)
    worker._must_look = True
    while house.get(op).state is not OpState.DONE:
        worker.step()
        if house.engine.has_run(run):
            assert (house.weights(run) == before).all()
        worker._recorder.flush()


def test_samples_of_an_ended_session_give_back_their_seats(house: House) -> None:
    sampler = house.sampler()
    ops = [house.sample(sampler, seq, max_tokens=200) for seq in range(3)]
    worker = house.worker()
    until = time.monotonic() + 20
    while worker._engine.num_samples < 3:
        assert time.monotonic() < until
        worker.step()
    expire(house)
    settle(worker)
    assert worker._engine.num_samples == 0
    assert [house.get(op).state for op in ops] == [OpState.CANCELLED] * 3


def test_a_run_of_a_living_session_stays(house: House) -> None:
    run = house.create_run()
    worker = house.worker()
    train(house, run, range(1))
    settle(worker)
    settle(worker)
    assert house.engine.has_run(run)
