"""What goes into the next step: a pure function of the runnable ops, the limits and what each tenant had so far.

It decides order, sharing and fairness, and knows no rows, files, tensors or clocks. What stays true:

* Ops of one run leave in seq order, and nothing passes a barrier (an op that is neither forward nor backward).
* Barriers are cheap and go first, so that as many runs as possible reach the next pass together; where they have kept a
  pass waiting for long, it goes first.
* Runs that aren't in memory come in a few at a time, so that a flood of new ones stays a queue.
* A pass is filled tenant by tenant, the least served first, so that a tenant with ten runs gets one share.
* An op whose worker died under it (a suspect) runs alone, so that it can't take others with it a second time. Samples
  live long beside others, so one of them is a suspect only from its second death on.
* A tenant that comes, or comes back, starts level with the least served of those at work: it neither waits for them
  nor makes them wait for what they had before (`Shares`).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tinsmith.types import OpId, OpKind, RunId, TenantId

SUSPECT = 1  # deaths of workers that make an op of a run a suspect
SAMPLE_SUSPECT = 2


class Shares:
    """Tokens that each tenant has been given, trained and sampled, in the virtual time of fair queueing."""

    def __init__(self) -> None:
        self._given: dict[TenantId, float] = {}
        self._active: frozenset[TenantId] = frozenset()
        self._now = 0.0

    def enter(self, tenants: Iterable[TenantId]) -> Mapping[TenantId, float]:
        """What each tenant has been given, of all that have work now; those that had none until now catch up first."""
        active = frozenset(tenants)
        staying = active & self._active
        if staying:
            self._now = max(self._now, min(self._given[tenant] for tenant in staying))
        elif self._active:  # a pause: all start level after it
            self._now = max(self._now, *(self._given[tenant] for tenant in self._active))
        for tenant in active - self._active:
            self._given[tenant] = max(self._given.get(tenant, 0.0), self._now)
        self._active = active
        return {tenant: self._given[tenant] for tenant in active}

    def of(self, tenants: Iterable[TenantId]) -> Mapping[TenantId, float]:
        """The same for some of them, between two calls of `enter`."""
        return {tenant: max(self._given.get(tenant, 0.0), self._now) for tenant in tenants}

    def charge(self, tenant: TenantId, num_tokens: int) -> None:
        self._given[tenant] = self._given.get(tenant, self._now) + num_tokens


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
    is_resident: bool = True  # its run is in the engine

    @property
    def is_suspect(self) -> bool:
        return self.attempts >= (SAMPLE_SUSPECT if self.kind is OpKind.SAMPLE else SUSPECT)


@dataclass(frozen=True, slots=True)
class Limits:
    """num_samples: requests that are being sampled now. tenant_samples: how many of them each tenant has; with what it
    gets, at most max_tenant_samples. max_new_runs: how many runs may be brought into memory. passes_first: barriers
    have had more than their time."""

    pass_max_tokens: int
    max_new_samples: int
    num_samples: int = 0
    max_tenant_samples: int | None = None
    tenant_samples: Mapping[TenantId, int] = field(default_factory=dict)
    max_new_runs: int = 8
    passes_first: bool = False


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
        served: tokens that each tenant has been given, from `Shares`; absent means none.

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

    absent = [ops for ops in by_run.values() if not ops[0].is_resident]
    coming = {c.run_id for c in _fair(([ops[0]] for ops in absent), limits.max_new_runs, served, price=lambda _: 1)}
    by_run = {run: ops for run, ops in by_run.items() if ops[0].is_resident or run in coming}

    suspects = [ops[0] for ops in by_run.values() if ops[0].is_suspect]
    if suspects:
        suspect = min(suspects, key=lambda c: (c.attempts, c.seq_id, c.op_id))
        return Batch(passes=(suspect,)) if suspect.kind.is_pass else Batch(barriers=(suspect,))
    suspects = [sample for sample in samples if sample.is_suspect]
    if suspects and not limits.num_samples and limits.max_new_samples > 0:
        return Batch(samples=(min(suspects, key=lambda c: (c.attempts, c.op_id)),))
    max_new_samples = 0 if suspects else limits.max_new_samples  # let those that are there end first
    chosen_samples = _fair(([s] for s in _within_share(samples, limits)), max_new_samples, served, price=lambda _: 1)
    barriers = tuple(ops[0] for ops in by_run.values() if not ops[0].kind.is_pass)
    passes: tuple[Candidate, ...] = ()
    if limits.passes_first or not barriers:
        passes = _choose_pass(by_run.values(), limits.pass_max_tokens, served)
    if passes:
        barriers = ()
    batch = Batch(barriers=barriers, passes=passes, samples=tuple(chosen_samples))
    return batch if batch.ops else None


def newcomers(candidates: Iterable[Candidate], max_runs: int, served: Mapping[TenantId, float]) -> list[RunId]:
    """The first `max_runs` runs of these candidates, in the order in which they are to be brought into memory."""
    first: dict[RunId, Candidate] = {}
    for candidate in candidates:
        if candidate.run_id is not None:
            first.setdefault(candidate.run_id, candidate)
    chosen = _fair(([candidate] for candidate in first.values()), max_runs, served, price=lambda _: 1)
    return [candidate.run_id for candidate in chosen if candidate.run_id is not None]


def _within_share(samples: Iterable[Candidate], limits: Limits) -> Iterator[Candidate]:
    """Of each tenant's samples the first ones, up to its limit."""
    counts = Counter(limits.tenant_samples)
    for sample in samples:
        counts[sample.tenant_id] += 1
        if limits.max_tenant_samples is None or counts[sample.tenant_id] <= limits.max_tenant_samples:
            yield sample


def _choose_pass(
    runs: Iterable[Sequence[Candidate]], max_tokens: int, served: Mapping[TenantId, float]
) -> tuple[Candidate, ...]:
    open_runs = [_commuting_prefix(ops) for ops in runs]
    chosen = _fair(open_runs, max_tokens, served, price=lambda c: c.cost_tokens)
    return tuple(sorted(chosen, key=lambda c: (c.run_id or "", c.seq_id)))


def _commuting_prefix(ops: Sequence[Candidate]) -> list[Candidate]:
    prefix: list[Candidate] = []
    for op in ops:
        if not op.kind.is_pass or op.is_suspect:
            break
        prefix.append(op)
    return prefix


def _fair(
    queues: Iterable[Sequence[Candidate]],
    budget: int,
    served: Mapping[TenantId, float],
    price: Callable[[Candidate], int],
) -> list[Candidate]:
    """Take from the queues (each in its own order) until the budget is spent, the least served tenant first.

    `price` is what an op takes of the budget; what it adds to its tenant's share are its tokens.

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
        if spent + price(op) > budget and (taken or budget <= 0):
            continue  # this tenant's next op doesn't fit; a smaller one of another tenant may
        taken.append(op)
        spent += price(op)
        tokens = max(1, op.cost_tokens)
        if position + 1 < len(lines[index]):
            heapq.heappush(tenants[tenant], (given + tokens, index, position + 1))
        if tenants[tenant]:
            heapq.heappush(turns, (share + tokens, tenant))
    return taken
