"""What it costs to say how many requests quotas hold back, which is asked at every scrape."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.house import House, settle
from tinsmith.store import quotas
from tinsmith.store.prepared import driver_of
from tinsmith.store.quota_rules import Quota


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path)) as house:
        house.store.quotas.put(house.tenant, None, {Quota.REQUESTS: 0}, time.time())
        yield house


def test_what_has_ended_is_not_gone_over(house: House) -> None:
    with house.store._database.read() as conn:
        text = quotas._WAITING._text(conn.dialect)
        plan = driver_of(conn).execute("EXPLAIN QUERY PLAN " + text.sql, text.bind({"tenant_ids": [], "most": 9}))
        steps = [row[-1] for row in plan]
    assert any("ix_ops_run_queue" in step for step in steps), steps
    assert not any("TEMP B-TREE" in step for step in steps), steps


def test_it_takes_a_hundredth_of_the_time_at_most(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processor's, however often it is asked; a changed quota is counted anew."""
    sampler = house.sampler()
    for seq in range(3):
        house.sample(sampler, seq)
    clocks: dict[str, Any] = {"now": 100.0, "cpu": 0.0}

    def thread_time() -> float:
        clocks["cpu"] += 0.5
        return float(clocks["cpu"])

    monkeypatch.setattr(quotas.time, "monotonic", lambda: clocks["now"])
    monkeypatch.setattr(quotas.time, "thread_time", thread_time)
    held = house.store.quotas.num_held
    assert held(time.time()) == {house.tenant: 3}
    house.sample(sampler, 3)
    clocks["now"] += 49.0
    assert held(time.time()) == {house.tenant: 3}
    clocks["now"] += 2.0
    assert held(time.time()) == {house.tenant: 4}
    house.sample(sampler, 4)
    house.store.quotas.put(house.tenant, None, {Quota.REQUESTS: 0}, time.time())
    assert held(time.time()) == {house.tenant: 5}


def test_so_many_are_looked_at_at_most(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MAX_COUNTED", 2)
    sampler = house.sampler()
    for seq in range(3):
        house.sample(sampler, seq)
    assert house.store.quotas.num_held(time.time()) == {house.tenant: 2}


def test_what_no_quota_holds_back_is_told_apart(house: House) -> None:
    """A tenant with some of its requests held has others that wait for another reason: those after them in a run don't
    count."""
    now = time.time()
    house.store.quotas.put(house.tenant, None, {Quota.REQUESTS: None}, now)
    run = house.create_run()
    settle(house.worker())
    bounds = {Quota.RUNS: 1.0}
    house.store.quotas.put(house.tenant, None, bounds, now)
    house.optim_step(house.create_run(), 1)
    assert house.store.quotas.num_held(now) == {house.tenant: 2}
    assert house.store.quotas.free_since(now) == {house.tenant: None}
    house.optim_step(run, 1)
    house.store.quotas.put(house.tenant, None, bounds, now)  # which has it counted anew
    since = house.store.quotas.free_since(now)[house.tenant]
    assert since is not None
    assert since >= now
