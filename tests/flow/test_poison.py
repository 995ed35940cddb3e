"""An op that ends every worker that computes it is found, alone; whoever was beside it notices nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flow.house import House, settle, train
from tinsmith.fake_engine import FakeEngine
from tinsmith.files.datadir import ServerInfo
from tinsmith.serve.main import excuse_left
from tinsmith.store.fences import MAX_EXCUSED
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId, OpState, RunStatus
from tinsmith.worker.claims import MAX_ATTEMPTS

NUM_RUNS = 16


class Killed(BaseException):
    """The worker's process is gone."""


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with contextlib.ExitStack() as stack:

        def make(name: str, **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


def poison(monkeypatch: pytest.MonkeyPatch, op_id: OpId) -> None:
    """Every engine ends its process when it is to compute this op."""
    apply = FakeEngine.apply

    def kills(self: FakeEngine, item: Any, num_runs: int, num_tokens: int) -> Any:
        if item.op_id == op_id:
            raise Killed
        return apply(self, item, num_runs, num_tokens)

    monkeypatch.setattr(FakeEngine, "apply", kills)


def live(house: House, most: int = 20) -> int:
    """Workers one after another until one comes to rest; how many died."""
    for deaths in range(most):
        try:
            settle(house.worker())
        except Killed:
            continue
        return deaths
    raise AssertionError("the workers die for ever")


def weights(house: House) -> dict[str, bytes]:
    return {run: house.weights(run).tobytes() for run in sorted(house.engine._runs)}


def test_one_of_sixteen_in_a_pass_kills_it_and_fails_alone(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(house: House) -> tuple[list[OpRow], OpRow]:
        runs = [house.create_run(seed=seed) for seed in range(NUM_RUNS)]
        ops = [op for run in runs for op in train(house, run, range(1))]
        bad = house.forward_backward(runs[5], 3, [9, 9, 9])
        others = [house.forward_backward(run, 3, [7]) for run in runs if run != runs[5]]
        after = [house.optim_step(run, 4) for run in runs]
        return ops + others + after, bad

    house, quiet = build("poisoned"), build("quiet")
    innocent, bad = work(house)
    poison(monkeypatch, bad.id)
    assert live(house) == 4, "once among the others, then alone until it is held to be the cause"
    failure = house.get(bad).failure
    assert failure is not None
    assert "ended its worker process each time" in failure.message
    rows = [house.get(op) for op in innocent]
    assert {row.state for row in rows} == {OpState.DONE}, "its own run goes on too"
    assert max(row.attempts for row in rows) == 2, "whoever shared the fatal pass was run once more, alone"

    monkeypatch.undo()
    work(quiet)
    settle(quiet.worker())
    expected = weights(quiet)
    found = weights(house)
    names = list(zip(sorted(found), sorted(expected), strict=True))
    assert [found[a] == expected[b] for a, b in names] == [not a.endswith(":5") for a, _ in names]


def test_a_replay_that_kills_costs_its_run_alone_and_after_four_deaths(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house, quiet = build("poisoned"), build("quiet")
    done = {}
    for each in (house, quiet):
        runs = [each.create_run(seed=seed) for seed in range(4)]
        done[each] = [train(each, run, range(3)) for run in runs]
        settle(each.worker())
    bad = done[house][2][2]
    poison(monkeypatch, bad.id)
    before = house.result(bad)
    more = [train(house, run, range(3, 4)) for run in runs_of(house)]
    assert live(house) == 4
    for index, ops in enumerate(more):
        assert {house.get(op).state for op in ops} == {OpState.FAILED if index == 2 else OpState.DONE}
    failure = house.get(more[2][0]).failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert "ended 4 workers" in failure.message
    assert house.result(bad) == before, "what was recorded stays"
    lost = runs_of(house)[2]
    assert house.store.runs.get(house.tenant, lost).status is RunStatus.CORRUPTED

    for run in runs_of(quiet):
        train(quiet, run, range(3, 4))
    settle(quiet.worker())
    for index, (a, b) in enumerate(zip(runs_of(house), runs_of(quiet), strict=True)):
        if index != 2:
            np.testing.assert_array_equal(house.weights(a), quiet.weights(b))

    assert house.store.replays.begun() == {bad.id: 4}
    monkeypatch.undo()
    house.store.replays.forget()  # the server was started anew, with what mends it
    again = house.forward_backward(lost, 9, [1], forward_only=True)
    settle(house.worker())
    assert house.get(again).state is OpState.DONE
    assert house.store.runs.get(house.tenant, lost).status is RunStatus.READY
    assert house.store.replays.begun() == {}


def runs_of(house: House) -> list[Any]:
    return sorted(f"{house.session}:train:{number}" for number in range(house._num_runs))


@pytest.mark.parametrize(("num_kills", "state"), [(12, OpState.DONE), (30, OpState.FAILED)])
def test_who_is_killed_from_outside_is_not_held_to_be_the_cause(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, num_kills: int, state: OpState
) -> None:
    house = build("house")
    op = house.forward_backward(house.create_run(), 1, [1, 2])
    settled = settle_killed(house, monkeypatch, op, num_kills)
    monkeypatch.undo()
    settle(house.worker())
    assert house.get(op).state is state
    assert settled == min(num_kills, MAX_EXCUSED + MAX_ATTEMPTS)


def test_a_replay_during_which_workers_are_killed_from_outside_is_tried_on(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build("house")
    run = house.create_run()
    ops = train(house, run, range(2))
    settle(house.worker())
    more = train(house, run, range(2, 3))
    assert settle_killed(house, monkeypatch, ops[2], 2 * MAX_ATTEMPTS) == 2 * MAX_ATTEMPTS
    monkeypatch.undo()
    settle(house.worker())
    assert {house.get(op).state for op in more} == {OpState.DONE}


@pytest.mark.parametrize(
    ("num_ends", "oom_kills", "state"),
    [(12, None, OpState.DONE), (12, 7, OpState.DONE), (12, 8, OpState.FAILED), (30, 7, OpState.FAILED)],
    ids=["in haste", "killed", "out of memory", "again and again"],
)
def test_the_end_of_the_whole_server_is_nobodys_fault(
    build: Callable[..., House],
    monkeypatch: pytest.MonkeyPatch,
    num_ends: int,
    oom_kills: int | None,
    state: OpState,
) -> None:
    house = build("house")
    op = house.forward_backward(house.create_run(), 1, [1, 2])
    left = ServerInfo("0", "http://x", 1, 2, 3, {}, oom_kills=7)
    poison(monkeypatch, op.id)
    for _ in range(num_ends):
        worker = house.worker()
        with contextlib.suppress(Killed):
            settle(worker)
        excuse_left(house.store, [worker._me.slot], left if oom_kills else None, oom_kills)
    monkeypatch.undo()
    settle(house.worker())
    assert house.get(op).state is state


def settle_killed(house: House, monkeypatch: pytest.MonkeyPatch, op: OpRow, num_kills: int) -> int:
    """Workers that somebody kills while they compute this op, so many of them at most; how many were killed."""
    poison(monkeypatch, op.id)
    for deaths in range(num_kills):
        worker = house.worker()
        try:
            settle(worker)
        except Killed:
            house.store.workers.vacate(worker._me.slot, is_excused=True)
        else:
            return deaths
    return num_kills
