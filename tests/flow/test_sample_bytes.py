"""What sample requests hold in the engine is bounded in bytes, and no tenant holds all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.house import House, settle
from tinsmith.types import OpState
from tinsmith.worker import samples
from tinsmith.worker.loop import Worker


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "house")) as house:
        yield house


def test_payloads_in_the_engine_are_bounded_and_a_newcomer_finds_room(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = house.sampler()
    ops = [house.sample(sampler, seq) for seq in range(40)]
    size = ops[0].payload_bytes
    monkeypatch.setattr(samples, "MAX_BYTES", 16 * size)
    worker = house.worker()
    step(worker)
    assert [op.id for op in worker._samples.resident] == [op.id for op in ops[:14]], "7 of 8"
    house.be("bob")
    late = house.sample(house.sampler(), 0)
    step(worker)
    assert late.id in {op.id for op in worker._samples.resident}
    settle(worker)
    assert all(house.get(op).state is OpState.DONE for op in [*ops, late])
    assert not worker._samples._held_bytes


def test_a_single_request_may_be_larger_than_the_bound(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_BYTES", 1)
    sampler = house.sampler()
    ops = [house.sample(sampler, seq) for seq in range(3)]
    worker = house.worker()
    step(worker)
    assert len(worker._samples.resident) == 1
    settle(worker)
    assert all(house.get(op).state is OpState.DONE for op in ops)


def test_what_is_given_back_counts_no_more(house: House) -> None:
    sampler = house.sampler()
    for seq in range(3):
        house.sample(sampler, seq)
    worker = house.worker()
    step(worker)
    assert worker._samples._held_bytes.total() > 0
    worker.close()
    assert not worker._samples._held_bytes


def step(worker: Worker) -> None:
    worker._must_look = True
    worker.step()
