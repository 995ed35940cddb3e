"""Quotas without a worker: the rules alone, and their accounting in the database under random histories."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.scopes import Scope
from tinsmith.store import Store, open_store
from tinsmith.store.ledger import HOUR_S
from tinsmith.store.quota_gates import tally
from tinsmith.store.quota_rules import (
    OF_A_PERIOD,
    Asked,
    Gate,
    Hold,
    Prices,
    Quota,
    asked,
    day_of,
    duration,
    month_of,
    never_fits,
    tokens_of,
    told,
)
from tinsmith.store.rows import Finished, NewOp, NewSampler, OpRow, Principal, WorkerId
from tinsmith.store.usage_rows import Usage, UsageKind
from tinsmith.types import OpId, OpKind, OpState, SamplerId, TenantId

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
ASKS = st.builds(
    Asked,
    tokens=st.integers(0, 50),
    usd=st.floats(0, 5),
    runs=st.integers(0, 1),
    adapter_bytes=st.integers(0, 50),
    storage_bytes=st.integers(0, 50),
)


@given(st.dictionaries(st.sampled_from(Quota), st.integers(0, 100)), st.lists(ASKS, max_size=30))
def test_no_gate_lets_more_through_than_its_limit_and_one_request(limits: dict[Quota, int], asks: list[Asked]) -> None:
    gate = Gate(limits)
    begun: list[Asked] = []
    for ask in asks:
        if gate.hold(ask) is None:
            gate.begin(ask)
            begun.append(ask)
    for quota, limit in limits.items():
        parts = [part for ask in begun if (part := ask.of(quota)) > 0]
        assert gate.under_way.get(quota, 0) == pytest.approx(sum(parts))
        if quota in OF_A_PERIOD:
            assert sum(parts[:-1]) < limit or not parts[:-1]
        else:
            assert sum(parts) <= limit or (len(parts) == 1 and limit > 0)
        assert limit > 0 or not parts


@given(st.dictionaries(st.sampled_from(Quota), st.integers(1, 100)), ASKS)
def test_what_is_not_refused_begins_when_nothing_else_is_under_way(limits: dict[Quota, int], ask: Asked) -> None:
    assert never_fits(limits, ask) is not None or Gate(limits).hold(ask) is None


def test_kinds_of_requests_take_what_they_leave_behind() -> None:
    prices = Prices(training=2.0, prefill=1.0, sample=4.0)
    assert asked(OpKind.FORWARD_BACKWARD, 500_000, 10, prices) == Asked(tokens=500_000, usd=1.0)
    assert asked(OpKind.SAMPLE, 500_000, 0, prices) == Asked(tokens=500_000, usd=2.0)
    assert asked(OpKind.CREATE, 0, 10, prices) == Asked(runs=1, adapter_bytes=10)
    assert asked(OpKind.SAVE, 0, 10, prices) == Asked(storage_bytes=30)
    assert asked(OpKind.SAVE_SAMPLER, 0, 10, prices) == Asked(storage_bytes=10)
    assert asked(OpKind.OPTIM_STEP, 0, 10, prices) == Asked()
    used = {UsageKind.TRAINING: 10**6, UsageKind.SAMPLE: 10**6, UsageKind.CHECKPOINT: 3}
    assert prices.of(used) == 6.0
    assert tokens_of(used) == 2 * 10**6


@pytest.mark.parametrize(
    ("hold", "text"),
    [
        (
            Hold(Quota.TOKENS_PER_DAY, 1_000_000, 1_000_400),
            "1,000,400 tokens of today used, of 1,000,000 (quota tokens_per_day of this tenant); goes on at 00:00 UTC, "
            "in 12 h",
        ),
        (
            Hold(Quota.USD_PER_MONTH, 20, 20.5, "key"),
            "20.50 USD of this month used, of 20.00 (quota usd_per_month of this key); goes on at 2026-12-01 00:00 "
            "UTC, in 8 d 12 h",
        ),
        (
            Hold(Quota.REQUESTS, 4, 4),
            "4 requests of this tenant are computed, of 4 at one time (quota requests); goes on when some of them end, "
            "in about 2 min",
        ),
        (
            Hold(Quota.TOKENS_PER_DAY, 0, 0),
            "the quota tokens_per_day of this tenant is 0, which pauses all that takes part of it; goes on when an "
            "administrator raises it",
        ),
        (
            Hold(Quota.RUNS, 3, 3),
            "3 runs of this tenant are open, of 3 (quota runs); goes on when a session with runs ends, by itself "
            "10 min after its client has gone, or 1 min after the last request of a run whose session had ended",
        ),
        (
            Hold(Quota.ADAPTER_BYTES, 3000, 2500),
            "adapters of open runs of this tenant take 2,500 bytes, of 3,000 (quota adapter_bytes); goes on when a "
            "session with runs ends, by itself 10 min after its client has gone, or 1 min after the last request of a "
            "run whose session had ended",
        ),
        (
            Hold(Quota.QUEUED_TOKENS, 5000, 4000),
            "4,000 tokens of this tenant are computed, of 5,000 at one time (quota queued_tokens); goes on when some "
            "of them end, in about 2 min",
        ),
        (
            Hold(Quota.STORAGE_BYTES, 5000, 4000, lacking=1500, frees_at=NOON + 11_520),
            "checkpoints of this tenant take 4,000 bytes, of 5,000 (quota storage_bytes); goes on when 1,500 bytes of "
            "them are deleted, or by itself in 3 h 12 min, when enough of them has expired",
        ),
        (
            Hold(Quota.STORAGE_BYTES, 5000, 4000, "key", lacking=1500),
            "checkpoints of this key take 4,000 bytes, of 5,000 (quota storage_bytes); goes on when 1,500 bytes of "
            "them are deleted; nothing that would make room expires by itself",
        ),
    ],
)
def test_a_reason_says_how_long(hold: Hold, text: str) -> None:
    assert told(hold, NOON, 600.0, 120.0) == text


def test_what_has_to_be_given_back_is_no_more_than_is_used() -> None:
    """A request that is larger than its quota, which was set meanwhile, begins once it is alone."""
    gate = Gate({Quota.STORAGE_BYTES: 10}, {Quota.STORAGE_BYTES: 7.0}.__getitem__)
    small, large = gate.hold(Asked(storage_bytes=5)), gate.hold(Asked(storage_bytes=50))
    assert small is not None
    assert large is not None
    assert (small.lacking, large.lacking) == (2, 7)


def test_every_quota_has_its_reason() -> None:
    for quota in Quota:
        assert f"quota {quota}" in told(Hold(quota, 1, 2), NOON, 600.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1 s"), (40, "40 s"), (60, "1 min"), (90, "1 min 30 s"), (11_520, "3 h 12 min"), (777_600, "9 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@dataclass
class History:
    """A tenant with a limit, whose samples are asked for, claimed by two workers, ended and cancelled."""

    store: Store
    limits: dict[Quota, float]
    now: float = NOON
    ids: Iterator[int] = field(default_factory=itertools.count)
    costs: dict[OpId, int] = field(default_factory=dict)
    begun_at: dict[OpId, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = f"t{time.monotonic_ns()}"
        self.tenant = self.store.tenants.create(name).tenant_id
        self.name = name
        key, _ = self.store.tenants.create_key(self.tenant, "k")
        self.key = key.key_id
        session = self.store.sessions.create(
            self.tenant, by=Principal(self.tenant, name, self.key, Scope.FULL)
        ).session_id
        self.sampler = SamplerId(f"{session}:sample:0")
        self.store.samplers.create(NewSampler(self.tenant, session, self.sampler, "tiny"), self.now)
        self.workers = [self.store.workers.register(f"{name}{n}", "tiny", 1e9, self.now) for n in range(2)]
        self.store.quotas.put(self.tenant, None, self.limits, self.now)
        self.open: dict[OpId, WorkerId | None] = {}

    def ask(self, costs: Sequence[int]) -> None:
        for cost in costs:
            self.ask_one(cost)

    def ask_one(self, cost: int) -> None:
        op_id = OpId(f"{self.name}-{next(self.ids)}")
        new = NewOp(
            tenant_id=self.tenant, kind=OpKind.SAMPLE, base_model="tiny", id=op_id, seq_id=len(self.costs),
            sampler_id=self.sampler, cost_tokens=cost,
        )  # fmt: skip
        self.store.ops.enqueue(new, self.now)
        self.costs[op_id] = cost
        self.open[op_id] = None

    def claim(self, number: int) -> None:
        worker = self.workers[number]
        waiting = [op_id for op_id, owner in self.open.items() if owner is None]
        for op in self.store.ops.claim(worker, waiting, self.now):
            self.open[op.id] = worker
            self.begun_at[op.id] = day_of(self.now)

    def end(self, share: float) -> None:
        for op_id, owner in list(self.open.items()):
            if owner is not None:
                used = Usage(sampled_tokens=int(self.costs[op_id] * share))
                finished = Finished(op_id, OpState.DONE, result=b"r", result_bytes=1, usage=used)
                self.store.ops.finish(owner, [finished], self.now)
                del self.open[op_id]
                return

    def cancel(self) -> None:
        if self.open:
            op_id, owner = self.open.popitem()
            self.store.endings.cancel(self.tenant, op_id, self.now)
            if owner is not None:
                self.store.endings.meter(owner, {op_id: Usage(sampled_tokens=1)}, self.now)

    def hand_back(self) -> None:
        for op_id, owner in self.open.items():
            if owner is not None:
                self.store.ops.unclaim(owner, [op_id])
                self.open[op_id] = None
                return

    def check(self) -> None:
        running = [op_id for op_id, owner in self.open.items() if owner is not None]
        assert len(running) <= self.limits.get(Quota.REQUESTS, len(running))
        tokens = [cost for op_id in running if (cost := self.costs[op_id])]
        assert sum(tokens) <= self.limits.get(Quota.QUEUED_TOKENS, 10**9) or len(tokens) == 1
        by_day: Counter[str] = Counter()
        for row in self.store.ledger.usage(self.tenant, 0, 2**40, 10**6):
            by_day[day_of(row.hour)] += row.quantity
            by_day[month_of(row.hour)] += row.quantity
            assert row.quantity > 0
            assert row.hour % HOUR_S == 0
        with self.store._database.read() as conn:
            for scope in (self.tenant, TenantId(self.key)):
                for period, quantity in by_day.items():
                    assert tokens_of(tally(conn, scope, period)) == quantity
        limit = self.limits.get(Quota.TOKENS_PER_DAY)
        if limit is not None:
            largest = max(self.costs.values(), default=0)
            reserved = sum(self.costs[op_id] for op_id in running if self.begun_at[op_id] == day_of(self.now))
            late = sum(self.costs[op_id] for op_id, day in self.begun_at.items() if day != day_of(self.now))
            assert by_day[day_of(self.now)] + reserved <= limit + largest + late


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.lists(st.integers(0, 30), min_size=1, max_size=4)),
    st.tuples(st.just("claim"), st.integers(0, 1)),
    st.tuples(st.just("end"), st.floats(0, 1)),
    st.tuples(st.sampled_from(["cancel", "hand_back", "tomorrow", "restart"]), st.none()),
)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        Quota.REQUESTS: st.integers(0, 4),
        Quota.QUEUED_TOKENS: st.integers(1, 60),
        Quota.TOKENS_PER_DAY: st.integers(0, 80),
    },
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quotas")
    open_store(root, synchronous="NORMAL").close()
    return root


@settings(max_examples=25, deadline=None)
@given(limits=LIMITS, steps=st.lists(STEPS, min_size=5, max_size=30))
def test_the_accounting_stays_exact_whatever_happens(
    root: Path, limits: dict[Quota, float], steps: list[tuple[str, Any]]
) -> None:
    """Never more under way than the limit, never more of a day than the limit and one request, and the tallies are the
    sums of the ledger; also after a restart, and at midnight."""
    history = History(open_store(root, synchronous="NORMAL"), limits)
    try:
        for name, value in steps:
            match name:
                case "tomorrow":
                    history.now += 86400
                case "restart":
                    history.store.close()
                    history.store = open_store(root, synchronous="NORMAL")
                case "ask" | "claim" | "end":
                    getattr(history, name)(value)
                case _:
                    getattr(history, name)()
            history.check()
    finally:
        history.store.close()


def test_a_smaller_request_doesn_t_pass_one_that_waits_for_tokens(root: Path) -> None:
    history = History(open_store(root, synchronous="NORMAL"), {Quota.QUEUED_TOKENS: 10})
    history.ask([6, 6, 4])
    rows: list[OpRow] = history.store.waiting.all(history.workers[0], "tiny", 1000).ops
    mine = [row for row in rows if row.tenant_id == history.tenant]
    held = history.store.quotas.held_back(mine, history.now).op_ids
    assert [row.cost_tokens for row in mine if row.id in held] == [6, 4]
    history.store.close()


def test_tallies_go_when_their_period_is_long_over_and_the_ledger_stays(root: Path) -> None:
    history = History(open_store(root, synchronous="NORMAL"), {})
    for _ in range(2):
        history.ask([5])
        history.claim(0)
        history.end(1.0)
        history.now += 200 * 86400
    history.now -= 200 * 86400
    history.store.quotas.forget(history.now)
    with history.store._database.read() as conn:
        kept = {of(at): tally(conn, history.tenant, of(at)) for at in (NOON, history.now) for of in (day_of, month_of)}
    assert [tokens_of(found) for found in kept.values()] == [0, 0, 5, 5]
    assert sum(row.quantity for row in history.store.ledger.usage(history.tenant, 0, 2**40, 100)) == 10
    history.store.close()
