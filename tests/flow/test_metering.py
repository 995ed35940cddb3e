"""What the worker meters: once for each request, whatever dies or is computed again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.flow.house import House, settle
from tinsmith.errors import FencedError
from tinsmith.fake_engine import TOKENS_PER_STEP
from tinsmith.store.usage_rows import Usage, UsageKind


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def metered(house: House) -> dict[tuple[str | None, UsageKind], int]:
    sums: Counter[tuple[str | None, UsageKind]] = Counter()
    for row in house.store.ledger.usage(None, 0, 2**40, 1000):
        assert row.base_model == "fake/base"
        assert row.session_id == house.session
        sums[row.run_id, row.kind] += row.quantity
    return dict(sums)


def test_every_kind_of_request(house: House) -> None:
    worker = house.worker()
    run, other = house.create_run(), house.create_run()
    house.forward_backward(run, 1, [1, 2, 3], copies=2)
    house.forward_backward(run, 2, [4, 5], forward_only=True)
    house.optim_step(run, 3)
    house.save(run, 4, "a")
    house.save_sampler(run, 5, house.sampler(number=9))
    house.forward_backward(other, 1, [1])
    sample = house.sample(house.sampler(), 0)
    settle(worker)
    num_prompt = 3
    assert metered(house) == {
        (run, UsageKind.TRAINING): 8,
        (run, UsageKind.CHECKPOINT): 1,
        (other, UsageKind.TRAINING): 1,
        (None, UsageKind.PREFILL): num_prompt,
        (None, UsageKind.SAMPLE): metered(house)[None, UsageKind.SAMPLE],
    }
    assert 0 < metered(house)[None, UsageKind.SAMPLE] <= 2 * 40
    assert house.get(sample).state == "done"


def test_prompt_tokens_that_were_there_already_count_as_cached(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = house.worker()
    sample = house.engine._sample
    monkeypatch.setattr(house.engine, "_sample", lambda item: replace(sample(item), prompt_cache_hit_tokens=2))
    house.sample(house.sampler(), 0, max_tokens=5)
    settle(worker)
    kinds = {kind: quantity for (_, kind), quantity in metered(house).items()}
    assert kinds == {UsageKind.PREFILL: 1, UsageKind.PREFILL_CACHED: 2, UsageKind.SAMPLE: 2 * 5}


def test_a_cancelled_sample_counts_for_what_was_computed(house: House) -> None:
    """Once, whatever is tried again; one that nobody had begun counts for nothing."""
    worker = house.worker()
    sampler = house.sampler()
    op = house.sample(sampler, 0, max_tokens=200)
    for _ in range(3):
        worker.step()
    house.store.endings.cancel(house.tenant, op.id, time.time())
    queued = house.sample(sampler, 1, max_tokens=200)
    house.store.endings.cancel(house.tenant, queued.id, time.time())
    settle(worker)
    assert {house.get(one).state for one in (op, queued)} == {"cancelled"}
    assert house.engine.num_samples == 0
    sampled = metered(house)[None, UsageKind.SAMPLE]
    assert metered(house) == {(None, UsageKind.PREFILL): 3, (None, UsageKind.SAMPLE): sampled}
    assert sampled in [2 * TOKENS_PER_STEP * steps for steps in (3, 4)]
    for one in (op, queued):
        house.store.endings.meter(worker._me, {one.id: Usage(sampled_tokens=1000)}, time.time())
    assert metered(house)[None, UsageKind.SAMPLE] == sampled


def test_an_outcome_that_comes_after_the_cancelling_counts_all_the_same(house: House) -> None:
    worker = house.worker()
    op = house.sample(house.sampler(), 0, max_tokens=8)
    (claimed,) = house.store.ops.claim(worker._me, [op.id], time.time())
    worker._samples.admit(claimed)
    house.store.endings.cancel(house.tenant, op.id, time.time())
    outcomes = worker._samples.step()
    for _ in range(2):
        worker._settling.commit(outcomes)
    assert house.get(op).state == "cancelled"
    assert metered(house) == {(None, UsageKind.PREFILL): 3, (None, UsageKind.SAMPLE): 2 * 8}


def test_a_worker_whose_place_was_taken_meters_nothing(house: House) -> None:
    worker = house.worker()
    op = house.sample(house.sampler(), 0, max_tokens=200)
    worker.step()
    house.worker()
    house.store.endings.cancel(house.tenant, op.id, time.time())
    with pytest.raises(FencedError):
        worker._drop_cancelled()
    assert metered(house) == {}


def test_a_stop_meters_what_was_cancelled_just_before(house: House) -> None:
    worker = house.worker()
    op = house.sample(house.sampler(), 0, max_tokens=200)
    worker.step()
    house.store.endings.cancel(house.tenant, op.id, time.time())
    worker.close()
    assert metered(house)[None, UsageKind.SAMPLE] == 2 * TOKENS_PER_STEP


def test_a_sampler_of_a_run_is_metered_with_the_run(house: House) -> None:
    worker = house.worker()
    run = house.create_run()
    sampler = f"{house.session}:sample:0"
    house.save_sampler(run, 1, sampler)
    settle(worker)
    house.sample(sampler, 0)
    settle(worker)
    assert metered(house)[run, UsageKind.PREFILL] == 3


def test_replays_and_deaths_meter_nothing_twice(house: House) -> None:
    """The run is replayed from its rows by each new worker; claimed work of a dead one is done by the next."""
    run = house.create_run()
    for seq in range(1, 6):
        house.forward_backward(run, seq, [1, 2, 3])
        settle(house.worker())
    dead = house.worker()
    house.forward_backward(run, 6, [1, 2, 3])
    dead._store.runs.lease(dead._me, "fake/base", 10)
    claimed = dead._store.ops.claim(
        dead._me, [op.id for op in house.store.waiting.all(dead._me, "fake/base", 9).ops], 1.0
    )
    assert len(claimed) == 1
    settle(house.worker())
    assert metered(house) == {(run, UsageKind.TRAINING): 18}


def test_a_failed_request_costs_nothing(house: House) -> None:
    worker = house.worker()
    run = house.create_run()
    load = house.load(run, 1, "t/nothing")
    sample = house.sample(house.sampler(blob="t/nothing"), 0)
    settle(worker)
    assert house.get(load).failure is not None
    assert house.get(sample).failure is not None
    assert metered(house) == {}
