"""What goes into the next step: a pure function of the runnable ops, the limits and what each tenant had so far.

It decides order, sharing and fairness, and knows no rows, files, tensors or clocks. What stays true:

* Ops of one run leave in seq order, and nothing passes a barrier (an op that is neither forward nor backward).
* Barriers are cheap and go first, so that as many runs as possible reach the next pass together.
* A pass is filled tenant by tenant, the least served first, so that a tenant with ten runs gets one share.
* An op whose worker died under it (a suspect) runs alone, so that it can't take others with it a second time.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinsmith.types import OpId, OpKind, RunId, TenantId


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runnable op. `attempts` counts the workers that claimed it and died; a replayed op has a result already."""

    op_id: OpId
    tenant_id: TenantId
    run_id: RunId | None
    kind: OpKind
    seq_id: int
    cost_tokens: int
    attempts: int = 0
    is_replay: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    pass_max_tokens: int
    max_new_samples: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The ops of one step. At most one of `barriers` and `passes` is filled; samples are admitted beside either."""

    barriers: tuple[Candidate, ...] = ()
    passes: tuple[Candidate, ...] = ()
    samples: tuple[Candidate, ...] = ()

    @property
    def ops(self) -> tuple[Candidate, ...]:
        return self.barriers + self.passes + self.samples


def plan(candidates: Iterable[Candidate], limits: Limits, served: Mapping[TenantId, float]) -> Batch | None:
    """Choose the next step.

    Args:
        candidates: all that may run now; of each run the contiguous prefix of its open ops.
        limits: the token budget of a pass, and how many sample requests can still be taken in.
        served: tokens that each tenant has been given so far; absent means none.

    Returns:
        The batch, or None when there is nothing to do. An op larger than the budget is taken alone.
    """
    by_run: dict[RunId, list[Candidate]] = defaultdict(list)
    samples: list[Candidate] = []
    for candidate in candidates:
        if candidate.run_id is None:
            samples.append(candidate)
        else:
            by_run[candidate.run_id].append(candidate)
    for ops in by_run.values():
        ops.sort(key=lambda c: c.seq_id)

    chosen_samples = _fair(([s] for s in samples), limits.max_new_samples, served, cost=lambda _: 1)
    barriers = tuple(ops[0] for ops in by_run.values() if not ops[0].kind.is_pass)
    passes = () if barriers else _choose_pass(by_run.values(), limits.pass_max_tokens, served)
    batch = Batch(barriers=barriers, passes=passes, samples=tuple(chosen_samples))
    return batch if batch.ops else None


def _choose_pass(
    runs: Iterable[Sequence[Candidate]], max_tokens: int, served: Mapping[TenantId, float]
) -> tuple[Candidate, ...]:
    open_runs = [_commuting_prefix(ops) for ops in runs]
    suspects = [ops[0] for ops in open_runs if ops[0].attempts]
    if suspects:
        return (min(suspects, key=lambda c: (c.attempts, c.seq_id, c.op_id)),)
    chosen = _fair(open_runs, max_tokens, served, cost=lambda c: c.cost_tokens)
    return tuple(sorted(chosen, key=lambda c: (c.run_id or "", c.seq_id)))


def _commuting_prefix(ops: Sequence[Candidate]) -> list[Candidate]:
    prefix: list[Candidate] = []
    for op in ops:
        if not op.kind.is_pass or (op.attempts and prefix):
            break
        prefix.append(op)
    return prefix


def _fair(
    queues: Iterable[Sequence[Candidate]],
    budget: int,
    served: Mapping[TenantId, float],
    cost: Callable[[Candidate], int],
) -> list[Candidate]:
    """Take from the queues (each in its own order) until the budget is spent, the least served tenant first.

    Within a tenant the queue from which least was taken goes first. The first op always fits.
    """
    tenants: dict[TenantId, list[tuple[int, int, int]]] = defaultdict(list)
    lines = [list(q) for q in queues if q]
    for index, line in enumerate(lines):
        heapq.heappush(tenants[line[0].tenant_id], (0, index, 0))
    turns = [(served.get(tenant, 0.0), tenant) for tenant in tenants]
    heapq.heapify(turns)
    taken: list[Candidate] = []
    spent = 0
    while turns:
        share, tenant = heapq.heappop(turns)
        given, index, position = heapq.heappop(tenants[tenant])
        op = lines[index][position]
        price = cost(op)
        if spent + price > budget and (taken or budget <= 0):
            continue  # this tenant's next op doesn't fit; a smaller one of another tenant may
        taken.append(op)
        spent += price
        if position + 1 < len(lines[index]):
            heapq.heappush(tenants[tenant], (given + price, index, position + 1))
        if tenants[tenant]:
            heapq.heappush(turns, (share + price, tenant))
    return taken
