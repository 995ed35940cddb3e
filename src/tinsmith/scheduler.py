"""What goes into the next step: a pure function of the runnable ops, the limits and whose turn it is.

It decides order, sharing and fairness, and knows no rows, files, tensors or clocks. What stays true:

* Ops of one run leave in seq order, and nothing passes a barrier (an op that is neither forward nor backward).
* Barriers are cheap and go first, so that as many runs as possible reach the next pass together; where they have kept a
  pass waiting for long, it goes first.
* Runs that aren't in memory come in a few at a time, so that a flood of new ones stays a queue.
* What passes and samples take follows one order, that of `fair_queueing`, and a pass is a cut of it: it ends before the
  first op that there is no room for. So the bounds stated there hold to the token:
  a tenant with ten runs gets one share, and a run that floods takes nothing from its sibling.
* An op whose worker died under it (a suspect) runs alone, so that it can't take others with it a second time. Samples
  live long beside others, so one of them is a suspect only from its second death on.

Passes and samples have accounts of their own (`Shares`): what one resource gives to a tenant while nobody else wants it
is not held against it at the other. How the time is split between the two is the loop's policy (`sampling_share`).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tinsmith.fair_queueing import Line, Standing, Turn, line_of
from tinsmith.types import OpId, OpKind, RunId, SamplerId, TenantId

SUSPECT = 1  # deaths of workers that make an op of a run a suspect
SAMPLE_SUSPECT = 2
LEVEL = Standing()  # nobody has had anything


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
    sampler_id: SamplerId | None = None

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
    """The ops of one step. At most one of `barriers` and `passes` is filled; samples are admitted beside either.

    trained, sampled: what the choice did to the virtual time of either account, for `Shares.took`.
    """

    barriers: tuple[Candidate, ...] = ()
    passes: tuple[Candidate, ...] = ()
    samples: tuple[Candidate, ...] = ()
    trained: Turn = Turn()
    sampled: Turn = Turn()

    @property
    def ops(self) -> tuple[Candidate, ...]:
        return self.barriers + self.passes + self.samples


def plan(
    candidates: Iterable[Candidate], limits: Limits, trained: Standing = LEVEL, sampled: Standing = LEVEL
) -> Batch | None:
    """Choose the next step.

    Args:
        candidates: all that may run now; of each run the contiguous prefix of its open ops.
        limits: the token budget of a pass, and how many sample requests can still be taken in.
        trained: whose turn it is to train, from `Shares`.
        sampled: whose turn it is to sample.

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
    coming, _ = _fair(([ops[0]] for ops in absent), limits.max_new_runs, trained, price=lambda _: 1)
    there = {c.run_id for c in coming}
    by_run = {run: ops for run, ops in by_run.items() if ops[0].is_resident or run in there}

    suspects = [ops[0] for ops in by_run.values() if ops[0].is_suspect]
    if suspects:
        suspect = min(suspects, key=lambda c: (c.attempts, c.seq_id, c.op_id))
        return Batch(passes=(suspect,)) if suspect.kind.is_pass else Batch(barriers=(suspect,))
    suspects = [sample for sample in samples if sample.is_suspect]
    if suspects and not limits.num_samples and limits.max_new_samples > 0:
        return Batch(samples=(min(suspects, key=lambda c: (c.attempts, c.op_id)),))
    max_new_samples = 0 if suspects else limits.max_new_samples  # let those that are there end first
    chosen_samples, sampled_turn = _choose_samples(samples, max_new_samples, limits, sampled)
    barriers = tuple(ops[0] for ops in by_run.values() if not ops[0].kind.is_pass)
    max_tokens = limits.pass_max_tokens if limits.passes_first or not barriers else 0
    passes, trained_turn = _choose_pass(by_run.values(), max_tokens, trained)
    if passes:
        barriers = ()
    trained_turn = replace(trained_turn, offered=frozenset(line_of(ops[0]) for ops in by_run.values()))
    batch = Batch(barriers, passes, chosen_samples, trained_turn, sampled_turn)
    return batch if batch.ops else None


def newcomers(candidates: Iterable[Candidate], max_runs: int, trained: Standing) -> list[RunId]:
    """The first `max_runs` runs of these candidates, in the order in which they are to be brought into memory."""
    first: dict[RunId, Candidate] = {}
    for candidate in candidates:
        if candidate.run_id is not None:
            first.setdefault(candidate.run_id, candidate)
    chosen, _ = _fair(([candidate] for candidate in first.values()), max_runs, trained, price=lambda _: 1)
    return [candidate.run_id for candidate in chosen if candidate.run_id is not None]


def _choose_samples(
    samples: Iterable[Candidate], max_new: int, limits: Limits, sampled: Standing
) -> tuple[tuple[Candidate, ...], Turn]:
    """Each tenant's up to its limit; of a sampler's the first ones."""
    lines: dict[Line, list[Candidate]] = defaultdict(list)
    for sample in samples:
        lines[line_of(sample)].append(sample)
    room: Counter[TenantId] | None = None
    if limits.max_tenant_samples is not None:
        room = Counter({line.tenant_id: limits.max_tenant_samples for line in lines})
        room.subtract(limits.tenant_samples)
    chosen, turn = _fair(lines.values(), max_new, sampled, price=lambda _: 1, room=room)
    return tuple(chosen), turn


def _choose_pass(
    runs: Iterable[Sequence[Candidate]], max_tokens: int, trained: Standing
) -> tuple[tuple[Candidate, ...], Turn]:
    open_runs = [_commuting_prefix(ops) for ops in runs]
    chosen, turn = _fair(open_runs, max_tokens, trained, price=lambda c: c.cost_tokens)
    return tuple(sorted(chosen, key=lambda c: (c.run_id or "", c.seq_id))), turn


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
    standing: Standing,
    price: Callable[[Candidate], int],
    room: Counter[TenantId] | None = None,
) -> tuple[list[Candidate], Turn]:
    """Take from the queues, each a line's and in its own order, until there comes one for which the budget has no room
    left: the tenant next whose op starts first in virtual time (of equals those that are due, then the one whose op
    ends first), and of its lines the one whose op starts first. The first op always fits.

    `price` is what an op takes of the budget; what it adds to tags are its tokens. `room`: how many ops more each
    tenant may have; who has had them stands aside and doesn't wait.
    """
    lines = {line_of(queue[0]): queue for queue in queues if queue}
    if not lines:
        return [], Turn()
    own: dict[TenantId, list[tuple[float, bool, int, Line, int]]] = defaultdict(list)
    for number, line in enumerate(lines):
        own[line.tenant_id].append((standing.lines.get(line, 0.0), line not in standing.waiting, number, line, 0))
    for heap in own.values():
        heapq.heapify(heap)
    tags = {tenant: standing.tenants.get(tenant, 0.0) for tenant in own}

    def end_of(tenant: TenantId) -> float:
        _, _, _, line, position = own[tenant][0]
        return tags[tenant] + max(1, lines[line][position].cost_tokens) / standing.weight(tenant)

    never = max(standing.due.values(), default=0) + 1
    turns = [(tags[tenant], standing.due.get(tenant, never), end_of(tenant), tenant) for tenant in own]
    heapq.heapify(turns)
    taken: list[Candidate] = []
    clock, clocks, spent = 0.0, dict[TenantId, float](), 0
    while turns and budget > 0:
        *_, tenant = turns[0]
        if room is not None and room[tenant] <= 0:
            heapq.heappop(turns)
            del own[tenant]
            continue
        line_tag, _, number, line, position = own[tenant][0]
        op = lines[line][position]
        clock, clocks[tenant] = max(clock, tags[tenant]), line_tag
        if taken and spent + price(op) > budget:
            break
        taken.append(op)
        spent += price(op)
        if room is not None:
            room[tenant] -= 1
        tokens = max(1, op.cost_tokens)
        if position + 1 < len(lines[line]):
            heapq.heapreplace(own[tenant], (line_tag + tokens, False, number, line, position + 1))
        else:
            heapq.heappop(own[tenant])
        if own[tenant]:
            tags[tenant] += tokens / standing.weight(tenant)
            heapq.heapreplace(turns, (tags[tenant], never, end_of(tenant), tenant))
        else:
            heapq.heappop(turns)
    waiting = frozenset(entry[3] for *_, tenant in turns for entry in own[tenant])
    return taken, Turn(clock, clocks, frozenset(lines), waiting)
