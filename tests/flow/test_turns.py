"""The worker goes on by itself as long as there is something that it can do: no ring and no scan is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.house import House
from tinsmith.types import OpState
from tinsmith.worker.busy import Busy


@pytest.fixture
def slow_scans(tmp_path: Path) -> Iterator[House]:
    """A worker that isn't rung looks once an hour."""
    house = House(tmp_path, scan_interval_s=3600.0, pass_max_tokens=16)
    yield house
    house.close()


def test_what_follows_a_pass_of_several_packs_is_begun_at_once(slow_scans: House) -> None:
    house = slow_scans
    run = house.create_run()
    ops = [house.forward_backward(run, 1, [1, 2, 3, 4, 5, 6, 7, 8], copies=8), house.optim_step(run, 2)]
    worker = house.worker()
    while worker.step():
        pass
    assert [house.get(op).state for op in ops] == [OpState.DONE, OpState.DONE]
    assert house.engine.num_forwards == 4


def test_what_came_early_is_run_once_the_gap_is_filled(slow_scans: House) -> None:
    house = slow_scans
    run = house.create_run()
    worker = house.worker()
    early = [house.optim_step(run, 3), house.forward_backward(run, 2, [1, 2])]
    while worker.step():
        pass
    assert {house.get(op).state for op in early} == {OpState.QUEUED}
    first = house.forward_backward(run, 1, [1, 2])
    worker._must_look = True
    while worker.step():
        pass
    assert {house.get(op).state for op in (first, *early)} == {OpState.DONE}


def test_a_look_reads_what_is_new_alone(slow_scans: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house = slow_scans
    run = house.create_run()
    worker = house.worker()
    while worker.step():
        pass
    reads: list[str] = []
    for name in ("all", "since"):
        plain = getattr(house.store.waiting, name)
        monkeypatch.setattr(
            house.store.waiting, name, lambda *args, n=name, call=plain: (reads.append(n), call(*args))[1]
        )
    for seq in (1, 3):
        house.forward_backward(run, seq, [1, 2])
        house.optim_step(run, seq + 1)
        worker._must_look = True
        while worker.step():
            pass
    assert reads == ["since", "since"]


def test_what_was_queued_again_is_seen(slow_scans: House) -> None:
    house = slow_scans
    run = house.create_run()
    worker = house.worker()
    while worker.step():
        pass
    op = house.forward_backward(run, 1, [1, 2])
    worker._must_look = True
    batch = worker._look()
    assert batch is not None
    worker._claim(batch)
    worker._settling.unclaim([op.id])
    while worker.step():
        pass
    assert house.get(op).state is OpState.DONE


def test_busy_counts_what_is_under_way() -> None:
    busy = Busy()
    assert busy.seconds == 0.0
    with busy:
        first = busy.seconds
        assert busy.seconds >= first
    after = busy.seconds
    assert after >= first
    assert busy.seconds == after
