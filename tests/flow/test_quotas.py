"""Quotas as the worker keeps them: who is over one waits, nobody fails, others go on, and it ends by itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.flow.house import House, settle
from tinsmith.fake_engine import FakeEngine
from tinsmith.store import quota_gates
from tinsmith.store.quota_rules import REOPENED_S, Prices, Quota
from tinsmith.store.rows import KeyRow, OpRow, Principal
from tinsmith.types import OpState, SessionId, TenantId
from tinsmith.worker import queue_view
from tinsmith.worker.loop import Worker


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path)) as house:
        yield house


def limit(house: House, tenant: TenantId | None = None, key: str | None = None, **limits: float | None) -> None:
    changes = {Quota(name): amount for name, amount in limits.items()}
    house.store.quotas.put(tenant or house.tenant, key, changes, time.time())


def states(house: House, ops: list[OpRow]) -> list[OpState]:
    return [house.get(op).state for op in ops]


def holder(house: House, key: KeyRow) -> Principal:
    return Principal(house.tenant, key.tenant_name, key.key_id, key.scope)


class Clock:
    """A day whose end the test decides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta()
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + self.ahead.total_seconds())

    def to_midnight(self) -> None:
        now = datetime.fromtimestamp(time.time(), UTC)
        self.ahead += (now + timedelta(days=1)).replace(hour=0, minute=0, second=1, microsecond=0) - now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """At the beginning of a day."""
    clock = Clock(monkeypatch)
    clock.to_midnight()
    return clock


def test_tokens_of_a_day_are_exceeded_by_one_request_and_go_on_at_midnight(house: House, clock: Clock) -> None:
    limit(house, tokens_per_day=10)
    run = house.create_run()
    passes = [house.forward_backward(run, seq, [1, 2, 3, 4]) for seq in range(1, 6)]
    step = house.optim_step(run, 6)
    worker = house.worker()
    settle(worker)
    assert states(house, passes) == ["done"] * 3 + ["queued"] * 2
    assert house.get(step).state is OpState.QUEUED  # it costs nothing, but may not pass those before it
    clock.to_midnight()
    settle(worker)
    assert states(house, [*passes, step]) == ["done"] * 6


def test_others_are_served_while_one_is_paused(house: House, clock: Clock) -> None:
    limit(house, tokens_per_day=3)
    run = house.create_run()
    mine = [house.forward_backward(run, seq, [1, 2, 3]) for seq in range(1, 4)]
    house.be("bob")
    other = house.create_run()
    others = [house.forward_backward(other, seq, [1, 2, 3]) for seq in range(1, 4)]
    settle(house.worker())
    assert states(house, mine) == ["done", "queued", "queued"]
    assert states(house, others) == ["done"] * 3


def test_a_crowd_that_is_held_back_hides_nobody_from_the_worker(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at so many requests at most."""
    monkeypatch.setattr(queue_view, "LOOK_AT_MOST", 4)
    limit(house, tokens_per_day=0)
    crowd = [house.create_run() for _ in range(6)]
    worker = house.worker()
    settle(worker)
    mine = [house.forward_backward(run, 1, [1, 2]) for run in crowd]
    mine += [house.sample(house.sampler(), seq) for seq in range(6)]
    before = house.session
    house.be("bob")
    while house.session < before:  # else they come first among the runs
        house.session = house.store.sessions.create(house.tenant).session_id
    others = [house.forward_backward(house.create_run(), 1, [1, 2]) for _ in range(3)]
    others += [house.sample(house.sampler(), seq) for seq in range(3)]
    settle(worker)
    assert states(house, others) == ["done"] * 6
    assert states(house, mine) == ["queued"] * 12


def test_a_crowd_that_waits_for_tomorrow_is_judged_once_in_a_while(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The looks in between cost the same as if it weren't there; what comes meanwhile waits with it, in order."""
    limit(house, tokens_per_day=0)
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    ops = [house.forward_backward(run, 1, [1, 2])]
    view = worker._queue
    view.distrust()
    view.look()
    view._scan_interval_s = 3600.0
    ops.append(house.optim_step(run, 2))
    judged: list[int] = []
    held_back = house.store.quotas.held_back
    monkeypatch.setattr(
        house.store.quotas, "held_back", lambda ops, now: judged.append(len(list(ops))) or held_back(ops, now)
    )
    view.look()
    assert judged == [0]
    assert not view.ops
    limit(house, tokens_per_day=None)
    view.look()
    assert not view.ops
    view._scan_interval_s = 0.0
    view.look()
    assert [op.id for op in view.ops] == [op.id for op in ops]


@pytest.mark.parametrize("why", ["runs", "storage_bytes", "key"])
def test_what_waits_for_long_slows_nothing_else_of_its_tenant(
    house: House, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """A run that waits for its place, a save that waits for room, a key whose day is used up: the others' requests are
    seen as soon as they come, and not only when all is read again."""
    worker, run, other = house.worker(), house.create_run(), house.create_run()
    spent, _ = house.store.tenants.create_key(house.tenant, "spent")
    settle(worker)
    house.key_id = spent.key_id
    if why == "runs":
        limit(house, runs=2)
        made: list[OpRow] = []
        monkeypatch.setattr(house, "acknowledged", made.append)
        house.create_run()
        held = list(made)
    elif why == "storage_bytes":
        with house.store._database.write() as conn:
            conn.exec_driver_sql("UPDATE runs SET adapter_bytes = 100")
        limit(house, storage_bytes=0)
        held = [house.save(other, 1, "kept"), house.optim_step(other, 2)]
    else:
        limit(house, key=spent.key_id, tokens_per_day=0)
        held = [house.forward_backward(other, 1, [1, 2]), house.optim_step(other, 2)]
    house.key_id = None
    settle(worker)
    assert set(states(house, held)) == {OpState.QUEUED}
    view = worker._queue
    view.look()
    view._scan_interval_s = 3600.0
    ops = [house.forward_backward(run, 1, [1, 2])]
    assert not view.has_told(ops), "what comes is judged first"
    view.look()
    assert [op.id for op in view.ops] == [op.id for op in ops]
    late = house.forward_backward(other, 3, [1, 2]) if why != "runs" else None
    judged: list[str] = []
    held_back = house.store.quotas.held_back
    monkeypatch.setattr(
        house.store.quotas, "held_back", lambda ops, now: judged.extend(op.id for op in ops) or held_back(ops, now)
    )
    view.look()
    assert judged == [op.id for op in ops], "what waits for long is left alone"
    settle(worker)
    assert states(house, ops) == [OpState.DONE]
    assert set(states(house, held)) == {OpState.QUEUED}
    limit(house, runs=None, storage_bytes=None)
    limit(house, key=spent.key_id, tokens_per_day=None)
    view._scan_interval_s = 0.0
    settle(worker)
    assert set(states(house, [*held, *([late] if late else [])])) == {OpState.DONE}


def test_what_was_used_is_remembered_by_the_next_worker(house: House, clock: Clock) -> None:
    limit(house, tokens_per_day=3)
    run = house.create_run()
    first = house.forward_backward(run, 1, [1, 2, 3])
    settle(house.worker())
    second = house.forward_backward(run, 2, [1, 2, 3])
    settle(house.worker())
    assert states(house, [first, second]) == ["done", "queued"]
    limit(house, tokens_per_day=4)
    settle(house.worker())
    assert house.get(second).state is OpState.DONE


def most_at_once(house: House, worker: Worker, ops: list[OpRow]) -> int:
    """Work until all have ended; how many were computed at one time, as far as the rows said."""
    most, until = 0, time.monotonic() + 30
    while not all(state.is_final for state in states(house, ops)):
        assert time.monotonic() < until
        worker.step()
        most = max(most, states(house, ops).count(OpState.RUNNING))
        worker._must_look = True
    return most


def test_so_many_samples_are_computed_at_one_time_as_the_quota_says(house: House) -> None:
    limit(house, requests=2)
    sampler = house.sampler()
    ops = [house.sample(sampler, seq) for seq in range(6)]
    assert 1 <= most_at_once(house, house.worker(), ops) <= 2
    assert states(house, ops) == ["done"] * 6


def test_two_workers_together_keep_the_quota(house: House) -> None:
    limit(house, requests=3)
    sampler = house.sampler()
    ops = [house.sample(sampler, seq) for seq in range(8)]
    workers = [house.worker("one"), house.worker("two")]
    most = 0
    until = time.monotonic() + 30
    while not all(state.is_final for state in states(house, ops)):
        assert time.monotonic() < until
        for worker in workers:
            worker._must_look = True
            worker.step()
        most = max(most, states(house, ops).count(OpState.RUNNING))
    assert 1 <= most <= 3


def test_a_claim_is_judged_in_its_own_transaction(house: House) -> None:
    """A worker that looked before others claimed gets no more than the quota leaves."""
    limit(house, requests=2)
    sampler = house.sampler()
    ops = [house.sample(sampler, seq) for seq in range(4)]
    one, two = (house.store.workers.register(slot, "fake/base", 60, time.time()) for slot in ("one", "two"))
    assert len(house.store.ops.claim(one, [op.id for op in ops[:1]], time.time())) == 1
    claimed = house.store.ops.claim(two, [op.id for op in ops[1:]], time.time())
    assert [op.id for op in claimed] == [ops[1].id]


def test_a_refused_claim_doesn_t_let_later_requests_of_the_run_pass(house: House) -> None:
    """The limit is set between the worker's look and its claim: the step after the pass costs nothing, and waits."""
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    ops = [house.forward_backward(run, 1, [1, 2]), house.optim_step(run, 2)]
    worker._must_look = True
    worker._queue.look()
    assert len(worker._queue.ops) == 2
    limit(house, tokens_per_day=0)
    assert worker._claims.take_queued([ops[0].id]) == []
    assert not worker._queue.ops
    assert worker._queue.has_held
    settle(worker)
    assert states(house, ops) == ["queued", "queued"]
    limit(house, tokens_per_day=None)
    settle(worker)
    assert states(house, ops) == ["done", "done"]


def test_runs_of_a_tenant_take_turns_under_its_quota(house: House) -> None:
    """None of them is starved by one that always has more."""
    limit(house, requests=1)
    runs = [house.create_run() for _ in range(2)]
    worker = house.worker()
    settle(worker)
    ops = [house.forward_backward(run, seq, [1, 2]) for seq in (1, 2, 3) for run in runs]
    settle(worker)
    begun = sorted(ops, key=lambda op: house.get(op).started_at or 0.0)
    assert [op.id for op in begun] == [op.id for op in ops]


def test_queued_tokens_bound_what_is_computed_together_and_let_a_larger_one_run_alone(house: House) -> None:
    limit(house, queued_tokens=50)
    sampler = house.sampler()
    ops = [house.sample(sampler, seq, max_tokens=20) for seq in range(4)] + [house.sample(sampler, 9, max_tokens=60)]
    assert 1 <= most_at_once(house, house.worker(), ops) <= 2
    assert states(house, ops) == ["done"] * 5


def test_a_run_beyond_the_quota_is_made_when_a_session_ends(house: House) -> None:
    limit(house, runs=1)
    house.create_run()
    worker = house.worker()
    settle(worker)
    first, house.session = (
        SessionId(house.session),
        house.store.sessions.create(house.tenant).session_id,
    )
    second = house.create_run()
    op = house.forward_backward(second, 1, [1, 2])
    settle(worker)
    assert house.get(op).state is OpState.QUEUED
    house.store.sessions.finish(house.tenant, first, "success", None, time.time())
    settle(worker)
    assert house.get(op).state is OpState.DONE


def test_a_save_waits_for_room_among_the_checkpoints(house: House) -> None:
    run = house.create_run()
    first = house.save(run, 1, "first")
    worker = house.worker()
    settle(worker)
    assert house.get(first).state is OpState.DONE
    size = sum(row.size_bytes for row in house.store.ledger.storage(house.tenant, None, time.time()))
    house.store.quotas._known._places.clear()
    with house.store._database.write() as conn:
        conn.exec_driver_sql("UPDATE runs SET adapter_bytes = ?", (size // 3,))
    limit(house, storage_bytes=size * 1.5)
    second = house.save(run, 2, "second")
    settle(worker)
    assert house.get(second).state is OpState.QUEUED
    (kept,), _ = house.store.checkpoints.list(house.tenant, 10, 0)
    house.store.checkpoints.delete(house.tenant, run, kept.kind, "first")
    settle(worker)
    assert house.get(second).state is OpState.DONE


def test_who_waits_for_room_is_told_when_enough_expires(house: House) -> None:
    """Of what counts for the quota in its way: its key's own checkpoints, where it is the key's."""
    run, (key, _), (other, _) = house.create_run(), *(house.store.tenants.create_key(house.tenant, n) for n in "ab")
    names = ("soon", "later", "other", "stays")
    for seq, name in enumerate(names, 1):
        house.save(run, seq, name)
    settle(house.worker())
    now = time.time()
    with house.store._database.write() as conn:
        conn.exec_driver_sql("UPDATE runs SET adapter_bytes = 100")
        for name, by, expires_at in zip(
            names, (key, key, other, key), (now + 600, now + 7200, now + 60, None), strict=True
        ):
            conn.exec_driver_sql(
                "UPDATE checkpoints SET size_bytes = 200, key_id = ?, expires_at = ? WHERE name = ?",
                (by.key_id, expires_at, name),
            )
    house.store.quotas._known._places.clear()
    house.key_id = key.key_id
    asked = house.save(run, len(names) + 1, "more")  # 300 bytes
    for limits, frees_at in (
        ({"storage_bytes": 1000}, now + 60),
        ({"storage_bytes": 700}, now + 600),
        ({"storage_bytes": 650}, now + 7200),
        ({"storage_bytes": 450}, None),
    ):
        limit(house, **limits)
        hold = house.store.quotas.hold_of(asked, now)
        assert hold is not None
        assert (hold.lacking, hold.frees_at) == (1100 - limits["storage_bytes"], pytest.approx(frees_at)), limits
    limit(house, storage_bytes=None)
    limit(house, key=key.key_id, storage_bytes=800)
    hold = house.store.quotas.hold_of(asked, now)
    assert hold is not None
    assert (hold.owner, hold.lacking, hold.frees_at) == ("key", 100, pytest.approx(now + 600))


def test_a_key_s_quota_holds_for_the_sessions_that_it_opened(house: House) -> None:
    key, _ = house.store.tenants.create_key(house.tenant, "ci")
    limit(house, key=key.key_id, tokens_per_day=2)
    plain = house.create_run()
    house.session = house.store.sessions.create(house.tenant, by=holder(house, key)).session_id
    bound = house.create_run()
    ops = [house.forward_backward(run, seq, [1, 2, 3]) for run in (plain, bound) for seq in (1, 2)]
    settle(house.worker())
    assert states(house, ops) == ["done", "done", "done", "queued"]
    use = {scope.key_id: scope.used[Quota.TOKENS_PER_DAY] for scope in house.store.quotas.list(time.time())}
    assert use == {None: 9, key.key_id: 3}


def test_money_of_a_month_is_what_its_tokens_cost(house: House, clock: Clock) -> None:
    house.store.quotas._known.prices = Prices(training=1_000_000.0)
    limit(house, usd_per_month=5)
    run = house.create_run()
    ops = [house.forward_backward(run, seq, [1, 2, 3]) for seq in range(1, 5)]
    worker = house.worker()
    settle(worker)
    assert states(house, ops) == ["done", "done", "queued", "queued"]
    (use,) = house.store.quotas.list(time.time(), "alice")
    assert use.used[Quota.USD_PER_MONTH] == 6
    for _ in range(31):
        clock.to_midnight()
    settle(worker)
    assert states(house, ops) == ["done"] * 4


def test_an_idle_worker_goes_on_at_once_when_a_request_of_the_tenant_has_ended(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when it would have looked by itself."""
    woken: list[bool] = []
    limit(house, requests=1)
    sampler = house.sampler()
    for seq in range(2):
        house.sample(sampler, seq)
    worker = house.worker()
    monkeypatch.setattr(worker._recorder._storage._api, "_wake", lambda: woken.append(True))
    settle(worker)
    assert woken


def test_tenants_without_quotas_cost_no_look_at_what_is_under_way(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(house, tokens_per_day=1)
    house.be("bob")
    run = house.create_run()
    op = house.forward_backward(run, 1, [1, 2, 3])

    def never(*_: object) -> None:
        raise AssertionError("looked at")

    monkeypatch.setattr(quota_gates.Gates, "_of", never)
    settle(house.worker())
    assert house.get(op).state is OpState.DONE
    assert isinstance(house.engine, FakeEngine)


def next_session(house: House, by: Principal | None = None) -> None:
    """The one before ends."""
    house.store.sessions.finish(house.tenant, SessionId(house.session), "success", None, time.time())
    house.session = house.store.sessions.create(house.tenant, by=by).session_id


def test_a_run_that_trains_on_after_its_session_ended_counts_again(house: House, clock: Clock) -> None:
    limit(house, runs=1)
    worker = house.worker()
    first = house.create_run()
    settle(worker)
    next_session(house)
    second = house.create_run()
    settle(worker)
    ops = [house.forward_backward(first, 1, [1, 2]), house.optim_step(first, 2)]
    settle(worker)
    assert states(house, ops) == ["queued"] * 2
    assert used(house, Quota.RUNS) == 1
    hold = house.store.quotas.hold_of(house.get(ops[0]), time.time())
    assert hold is not None
    assert hold.quota is Quota.RUNS
    next_session(house)
    settle(worker)
    assert states(house, ops) == ["done"] * 2
    assert used(house, Quota.RUNS) == 1, "that of the run which was opened again"
    waits = house.forward_backward(second, 1, [1, 2])
    settle(worker)
    assert house.get(waits).state is OpState.QUEUED
    clock.ahead += timedelta(seconds=REOPENED_S + 1)
    settle(worker)
    assert house.get(waits).state is OpState.DONE
    assert used(house, Quota.RUNS) == 1


def test_its_adapter_bytes_count_again_too(house: House) -> None:
    worker = house.worker()
    first = house.create_run()
    settle(worker)
    with house.store._database.write() as conn:
        conn.exec_driver_sql("UPDATE runs SET adapter_bytes = 100")
    next_session(house)
    assert used(house, Quota.ADAPTER_BYTES) == 0
    house.forward_backward(first, 1, [1, 2])
    settle(worker)
    assert used(house, Quota.ADAPTER_BYTES) == 100


def test_runs_made_by_requests_that_outlived_their_session_are_no_way_around(house: House, clock: Clock) -> None:
    limit(house, runs=2)
    runs = [house.create_run() for _ in range(5)]
    next_session(house)
    worker = house.worker()
    settle(worker)
    assert used(house, Quota.RUNS) == 2
    for round_ in range(3):
        clock.ahead += timedelta(seconds=REOPENED_S + 1)
        settle(worker)
        assert used(house, Quota.RUNS) == (2 if round_ < 1 else 1 if round_ < 2 else 0)
    ops = [house.forward_backward(run, 1, [1, 2]) for run in runs]
    settle(worker)
    assert states(house, ops).count(OpState.DONE) == 2


def used(house: House, quota: Quota, key: str | None = None) -> float:
    return next(scope.used[quota] for scope in house.store.quotas.list(time.time()) if scope.key_id == key)


def test_a_key_s_quota_is_not_escaped_through_another_key_s_session(house: House) -> None:
    """What counts is the key that asks, not the one that opened the session."""
    bound, free = (holder(house, house.store.tenants.create_key(house.tenant, name)[0]) for name in ("ci", "me"))
    limit(house, key=bound.key_id, tokens_per_day=2)
    next_session(house, free)
    house.key_id = free.key_id
    mine, theirs = house.create_run(), house.create_run()
    ops = [house.forward_backward(mine, seq, [1, 2, 3]) for seq in (1, 2)]
    house.key_id = bound.key_id
    ops += [house.forward_backward(theirs, seq, [1, 2, 3]) for seq in (1, 2)]
    ops += [house.sample(house.sampler(), seq) for seq in (1, 2)]
    settle(house.worker())
    assert states(house, ops) == ["done", "done", "done", "queued", "queued", "queued"]
    assert used(house, Quota.TOKENS_PER_DAY, bound.key_id) == 3
    assert used(house, Quota.TOKENS_PER_DAY) == 9


def test_nor_are_its_runs_and_its_storage(house: House) -> None:
    bound, free = (holder(house, house.store.tenants.create_key(house.tenant, name)[0]) for name in ("ci", "me"))
    limit(house, key=bound.key_id, runs=1, storage_bytes=10**9)
    next_session(house, free)
    house.key_id = bound.key_id
    first, second = house.create_run(), house.create_run()
    save = house.save(first, 1, "mine")
    waits = house.forward_backward(second, 1, [1, 2])
    house.key_id = free.key_id
    third = house.create_run()
    goes = house.forward_backward(third, 1, [1, 2])
    settle(house.worker())
    assert states(house, [save, waits, goes]) == ["done", "queued", "done"]
    assert (used(house, Quota.RUNS, bound.key_id), used(house, Quota.RUNS)) == (1, 2)
    assert used(house, Quota.STORAGE_BYTES, bound.key_id) == used(house, Quota.STORAGE_BYTES) > 0
    successor, _ = house.store.tenants.rotate_key(bound.key_id, 0.0)
    house.store.quotas._limits_until = float("-inf")
    assert used(house, Quota.RUNS, successor.key_id) == 1
    assert used(house, Quota.STORAGE_BYTES, successor.key_id) == used(house, Quota.STORAGE_BYTES)
