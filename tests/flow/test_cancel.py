"""A cancelled sample leaves the queue, the engine and the tenant's share, and its outcome is dropped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.house import House, settle
from tinsmith.ipc.bell import Ringer
from tinsmith.store.end_rows import EndsAfter
from tinsmith.types import OpState


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "house")) as house:
        yield house


def cancel(house: House, op) -> OpState:
    return house.store.endings.cancel(house.tenant, op.id, time.time()).state


def test_a_queued_sample_is_never_taken(house: House) -> None:
    op = house.sample(house.sampler(), 0)
    assert cancel(house, op) == "queued"
    settle(house.worker())
    row = house.get(op)
    assert (row.state, row.attempts, row.payload) == ("cancelled", 0, None)


def test_a_running_sample_is_dropped_at_the_bell_and_pays_for_what_it_got(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = house.worker()
    charged: list[int] = []
    monkeypatch.setattr(worker._accounts, "charge_sample", lambda op, num_tokens: charged.append(num_tokens))
    sampler = house.sampler()
    op, other = house.sample(sampler, 0, max_tokens=200), house.sample(sampler, 1, max_tokens=200)
    for _ in range(3):
        worker.step()
    assert house.engine.num_samples == 2
    assert cancel(house, op) == "running"
    time.sleep(0.06)
    with contextlib.closing(Ringer(worker._bell._listener.path)) as ringer:
        ringer.ring()
    worker.step()
    assert house.engine.num_samples == 1
    assert {row.id for row in worker._samples.resident} == set(worker._samples._prompt_tokens) == {other.id}
    settle(worker)
    assert house.get(op).state == "cancelled"
    assert house.get(other).state == "done"
    assert 200 < sum(charged) < 400


def test_a_lost_bell_costs_a_scan(house: House) -> None:
    worker = house.worker()
    op = house.sample(house.sampler(), 0, max_tokens=250)
    worker.step()
    cancel(house, op)
    time.sleep(0.06)
    worker.step()
    assert house.engine.num_samples == 0


def test_an_outcome_that_comes_too_late_is_dropped(house: House) -> None:
    worker = house.worker()
    op = house.sample(house.sampler(), 0, max_tokens=8)
    (claimed,) = house.store.ops.claim(worker._me, [op.id], time.time())
    worker._samples.admit(claimed)
    cancel(house, op)
    worker._settling.commit(worker._samples.step())
    row = house.get(op)
    assert (row.state, row.result) == ("cancelled", None)
    assert house.store.endings.reached([EndsAfter(op.sampler_id, 0)])
    assert not house.store.endings.reached([EndsAfter(op.sampler_id, 1)])


def test_a_cancelled_sample_stays_so_when_its_worker_dies(house: House) -> None:
    op = house.sample(house.sampler(), 0, max_tokens=200)
    house.worker().step()
    cancel(house, op)
    settle(house.worker())
    assert house.get(op).state == "cancelled"


def test_what_has_ended_stays_as_it_is(house: House) -> None:
    op = house.sample(house.sampler(), 0)
    settle(house.worker())
    result = house.result(op)
    assert cancel(house, op) == "done"
    assert house.result(op) == result
