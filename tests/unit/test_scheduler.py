"""The scheduler is pure, so its promises are checked on arbitrary workloads."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.fair_queueing import Standing
from tinsmith.scheduler import Batch, Candidate, Limits, plan
from tinsmith.types import OpId, OpKind, RunId, TenantId

LIMITS = Limits(pass_max_tokens=1000, max_new_samples=8)
RUN_KINDS = [kind for kind in OpKind if kind is not OpKind.SAMPLE]


def op(run: str | None, seq: int, kind: OpKind, *, tenant: str = "t", cost: int = 10, attempts: int = 0) -> Candidate:
    return Candidate(
        OpId(f"{run}-{seq}-{tenant}"), TenantId(tenant), RunId(run) if run else None, kind, seq, cost, attempts
    )


@st.composite
def workloads(draw: st.DrawFn) -> list[Candidate]:
    candidates = []
    for run in range(draw(st.integers(0, 6))):
        tenant = draw(st.sampled_from(["a", "b", "c"]))
        for seq in range(draw(st.integers(0, 6))):
            kind = draw(st.sampled_from(RUN_KINDS))
            cost = draw(st.integers(0, 1500))
            attempts = draw(st.sampled_from([0, 0, 0, 0, 1, 2]))
            candidates.append(op(f"r{run}", seq, kind, tenant=tenant, cost=cost, attempts=attempts))
    for index in range(draw(st.integers(0, 12))):
        candidates.append(op(None, index, OpKind.SAMPLE, tenant=draw(st.sampled_from(["a", "b"])), cost=1))
    return draw(st.permutations(candidates))


def test_nothing_to_do_is_no_batch() -> None:
    assert plan([], LIMITS) is None


def test_all_runs_share_one_pass() -> None:
    batch = plan([op(f"r{i}", 1, OpKind.FORWARD_BACKWARD) for i in range(16)], LIMITS)
    assert batch is not None
    assert len({c.run_id for c in batch.passes}) == 16


def test_barriers_go_first_and_alone() -> None:
    batch = plan([op("a", 1, OpKind.FORWARD_BACKWARD), op("b", 4, OpKind.OPTIM_STEP)], LIMITS)
    assert batch is not None
    assert [c.run_id for c in batch.barriers] == ["b"]
    assert batch.passes == ()


def test_a_pass_stops_at_the_barrier_of_each_run() -> None:
    kinds = [OpKind.FORWARD, OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP, OpKind.FORWARD_BACKWARD]
    batch = plan([op("a", i, kind) for i, kind in enumerate(kinds)], LIMITS)
    assert batch is not None
    assert [c.seq_id for c in batch.passes] == [0, 1]


def test_an_op_beyond_the_budget_still_runs() -> None:
    batch = plan([op("a", 1, OpKind.FORWARD_BACKWARD, cost=10**6)], LIMITS)
    assert batch is not None
    assert len(batch.passes) == 1


def test_the_tenant_served_least_comes_first() -> None:
    crowd = [op(f"r{i}", 1, OpKind.FORWARD_BACKWARD, tenant="crowd", cost=600) for i in range(10)]
    single = op("s", 1, OpKind.FORWARD_BACKWARD, tenant="single", cost=600)
    batch = plan([*crowd, single], LIMITS, Standing({TenantId("crowd"): 1.0}))
    assert batch is not None
    assert [c.tenant_id for c in batch.passes] == ["single"]


def test_a_tenant_with_many_runs_gets_one_share() -> None:
    crowd = [op(f"r{i}", 1, OpKind.FORWARD_BACKWARD, tenant="crowd", cost=100) for i in range(20)]
    single = [op("s", seq, OpKind.FORWARD_BACKWARD, tenant="single", cost=100) for seq in range(20)]
    batch = plan(crowd + single, LIMITS)
    assert batch is not None
    shares: dict[str, int] = defaultdict(int)
    for c in batch.passes:
        shares[c.tenant_id] += c.cost_tokens
    assert shares == {"crowd": 500, "single": 500}


def test_a_suspect_runs_alone() -> None:
    others = [op(f"r{i}", 1, OpKind.FORWARD_BACKWARD) for i in range(4)]
    batch = plan([*others, op("bad", 1, OpKind.FORWARD_BACKWARD, attempts=1)], LIMITS)
    assert batch is not None
    assert [c.run_id for c in batch.passes] == ["bad"]


@given(workloads(), st.integers(1, 3000))
def test_order_and_budget_hold_for_any_workload(candidates: list[Candidate], budget: int) -> None:
    batch = plan(candidates, Limits(budget, 4))
    if not candidates:
        assert batch is None
        return
    assert batch is not None
    check_batch(batch, candidates, budget)


def check_batch(batch: Batch, candidates: list[Candidate], budget: int) -> None:
    assert not (batch.barriers and batch.passes)
    assert len(batch.samples) <= 4
    cost = sum(c.cost_tokens for c in batch.passes)
    assert cost <= budget or len(batch.passes) == 1
    for run in {c.run_id for c in batch.passes + batch.barriers}:
        chosen = sorted(c.seq_id for c in batch.passes + batch.barriers if c.run_id == run)
        waiting = sorted(c.seq_id for c in candidates if c.run_id == run)
        assert waiting[: len(chosen)] == chosen
    if any(c.attempts for c in batch.passes):
        assert len(batch.passes) == 1


@given(workloads())
def test_repeated_planning_empties_any_workload(candidates: list[Candidate]) -> None:
    """Work-conserving and free of starvation: every step takes something, and all is taken in the end."""
    left = list(candidates)
    for _ in range(len(candidates)):
        batch = plan(left, LIMITS)
        if batch is None:
            break
        taken = {c.op_id for c in batch.ops}
        left = [c for c in left if c.op_id not in taken]
    assert left == []


@pytest.mark.parametrize("kind", [OpKind.OPTIM_STEP, OpKind.LOAD, OpKind.CREATE])
def test_a_suspect_barrier_runs_alone(kind: OpKind) -> None:
    others = [op(f"r{i}", 1, kind) for i in range(4)] + [op(None, 1, OpKind.SAMPLE)]
    batch = plan([*others, op("bad", 1, kind, attempts=1)], LIMITS)
    assert batch is not None
    assert [c.run_id for c in batch.ops] == ["bad"]


def test_a_suspect_sample_waits_until_it_can_run_alone() -> None:
    work = [op("r", 1, OpKind.FORWARD_BACKWARD), op(None, 1, OpKind.SAMPLE), op(None, 2, OpKind.SAMPLE, attempts=2)]
    beside = plan(work, Limits(1000, 8, num_samples=3))
    assert beside is not None
    assert [c.kind for c in beside.ops] == [OpKind.FORWARD_BACKWARD], "those that are there end first"
    alone = plan(work, Limits(1000, 8, num_samples=0))
    assert alone is not None
    assert [c.seq_id for c in alone.ops] == [2]
    once = plan([op(None, 1, OpKind.SAMPLE, attempts=1), op(None, 2, OpKind.SAMPLE)], LIMITS)
    assert once is not None
    assert len(once.samples) == 2, "one death is no reason to sample one by one"


def test_a_tenants_samples_leave_room_for_anothers() -> None:
    crowd = [op(None, i, OpKind.SAMPLE, tenant="a") for i in range(20)]
    limits = Limits(1000, 100, max_tenant_samples=8, tenant_samples={TenantId("a"): 5})
    batch = plan([*crowd, op(None, 0, OpKind.SAMPLE, tenant="b")], limits)
    assert batch is not None
    assert sorted((c.tenant_id, c.seq_id) for c in batch.samples) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]


def test_a_pass_goes_before_barriers_that_had_their_time() -> None:
    work = [op("a", 1, OpKind.FORWARD_BACKWARD), *(op(f"r{i}", 0, OpKind.CREATE) for i in range(5))]
    batch = plan(work, Limits(1000, 8, passes_first=True))
    assert batch is not None
    assert [c.run_id for c in batch.ops] == ["a"]
    barriers = plan(work[1:], Limits(1000, 8, passes_first=True))
    assert barriers is not None
    assert len(barriers.barriers) == 5


def test_absent_runs_come_in_a_few_at_a_time_and_by_turns() -> None:
    crowd = [replace(op(f"r{i}", 0, OpKind.CREATE, tenant="crowd"), is_resident=False) for i in range(50)]
    single = replace(op("s", 0, OpKind.CREATE, tenant="single"), is_resident=False)
    batch = plan([*crowd, single, op("here", 1, OpKind.OPTIM_STEP)], Limits(1000, 8, max_new_runs=4))
    assert batch is not None
    runs = [c.run_id for c in batch.barriers]
    assert len(runs) == 5
    assert {"s", "here"} <= set(runs)
