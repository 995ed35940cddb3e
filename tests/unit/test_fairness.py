"""The bounds that `fair_queueing` states, over random workloads: who gets how much, who waits how long, nothing idle.

A small world plays the worker: requests arrive, a step is planned, what it took is charged and gone. It keeps its own
books; what the bounds are held against is never what the scheduler says about itself.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, count

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tinsmith.fair_queueing import Line, Shares, Turn, line_of
from tinsmith.scheduler import Batch, Candidate, Limits, newcomers, plan
from tinsmith.types import OpId, OpKind, RunId, SamplerId, TenantId

STEPS = 40
FLOOD = 12  # requests that a line which floods has waiting, always
EPS = 1e-6


@dataclass(slots=True)
class Traffic:
    """A line's requests. habit: flood, loop (a pass and a step, each awaited) or bursts. largest: tokens of one."""

    tenant: TenantId
    name: str
    habit: str
    largest: int
    is_sampler: bool
    queue: list[Candidate] = field(default_factory=list)
    seq: int = 0
    is_resident: bool = True

    @property
    def line(self) -> Line:
        return Line(self.tenant, self.name)

    def arrive(self, rng: random.Random, suspects: bool) -> None:
        if self.habit == "flood":
            while len(self.queue) < FLOOD:
                self._add(rng, suspects)
        elif self.habit == "loop" and not self.queue and rng.random() < 0.7:
            self._add(rng, suspects)
            if not self.is_sampler:
                self._add(rng, suspects, OpKind.OPTIM_STEP)
        elif self.habit == "bursts" and rng.random() < 0.15:
            for _ in range(rng.randint(1, 2 * FLOOD)):
                self._add(rng, suspects)
                if not self.is_sampler and rng.random() < 0.3:
                    self._add(rng, suspects, OpKind.OPTIM_STEP)

    def _add(self, rng: random.Random, suspects: bool, kind: OpKind = OpKind.FORWARD_BACKWARD) -> None:
        self.seq += 1
        self.queue.append(
            Candidate(
                OpId(f"{self.name}-{self.seq}"),
                self.tenant,
                None if self.is_sampler else RunId(self.name),
                OpKind.SAMPLE if self.is_sampler else kind,
                self.seq,
                0 if kind is OpKind.OPTIM_STEP else rng.randint(1, self.largest),
                attempts=2 if suspects and rng.random() < 0.03 else 0,
                sampler_id=SamplerId(self.name) if self.is_sampler else None,
            )
        )

    @property
    def choosable(self) -> list[Candidate]:
        """What of it one step may take."""
        found: list[Candidate] = []
        for op in self.queue:
            if not self.is_sampler and not op.kind.is_pass:
                break
            found.append(op)
        return found


@dataclass
class World:
    weights: dict[TenantId, float]
    lines: list[Traffic]
    budget: int
    rng: random.Random
    suspects: bool = False
    moving: bool = False  # runs leave memory at random
    max_new_runs: int = 2
    max_new_samples: int = 6
    max_tenant_samples: int = 20
    trained: Shares = field(default_factory=Shares)
    sampled: Shares = field(default_factory=Shares)
    resident_samples: list[Candidate] = field(default_factory=list)
    num_barrier_steps: int = 0

    def step(self) -> tuple[list[Candidate], Limits, Batch | None]:
        for traffic in self.lines:
            traffic.arrive(self.rng, self.suspects)
            if self.moving and self.rng.random() < 0.1:
                traffic.is_resident = False
        self.resident_samples = [s for s in self.resident_samples if self.rng.random() < 0.7]
        candidates = [
            replace(op, is_resident=traffic.is_resident or op.run_id is None)
            for traffic in self.lines
            for op in traffic.queue
        ]
        limits = Limits(
            self.budget, self.max_new_samples, len(self.resident_samples), self.max_tenant_samples,
            Counter(s.tenant_id for s in self.resident_samples), self.max_new_runs,
            passes_first=self.num_barrier_steps > 2,
        )  # fmt: skip
        for shares in (self.trained, self.sampled):
            shares.weigh(self.weights)
        trained = self.trained.enter(line_of(c) for c in candidates if c.run_id is not None)
        sampled = self.sampled.enter(
            (line_of(c) for c in candidates if c.run_id is None), {s.tenant_id for s in self.resident_samples}
        )
        batch = plan(candidates, limits, trained, sampled)
        if batch is not None:
            self._take(batch)
        return candidates, limits, batch

    def _take(self, batch: Batch) -> None:
        self.trained.took(batch.trained)
        self.sampled.took(batch.sampled)
        for op in batch.passes:
            self.trained.charge(op, op.cost_tokens)
        for op in batch.samples:
            self.sampled.charge(op, op.cost_tokens)
        self.num_barrier_steps = self.num_barrier_steps + 1 if batch.barriers else 0
        self.resident_samples += batch.samples
        gone = {op.op_id for op in batch.ops}
        for traffic in self.lines:
            if any(op.op_id in gone for op in traffic.queue):
                traffic.is_resident = True
            traffic.queue = [op for op in traffic.queue if op.op_id not in gone]


@st.composite
def worlds(draw: st.DrawFn, *, suspects: bool = False, moving: bool = False) -> World:
    tenants = [TenantId(f"t{number}") for number in range(draw(st.integers(1, 4)))]
    lines = []
    for tenant in tenants:
        for number in range(draw(st.integers(1, 3))):
            habit = draw(st.sampled_from(["flood", "flood", "loop", "bursts"]))
            is_sampler = draw(st.booleans())
            largest = draw(st.sampled_from([1, 10, 100, 1500]))
            lines.append(Traffic(tenant, f"{tenant}-{number}", habit, largest, is_sampler))
    weights = {tenant: draw(st.sampled_from([0.25, 1.0, 1.0, 2.0, 5.0])) for tenant in tenants}
    budget = draw(st.sampled_from([1, 50, 1000]))
    return World(weights, lines, budget, random.Random(draw(st.integers(0, 2**20))), suspects, moving)


class Spread:
    """How far two that wait all the time drift apart: the widest range of their difference since both began to wait."""

    def __init__(self) -> None:
        self._least = self._most = 0.0
        self._is_on = False

    def see(self, difference: float, both_wait: bool) -> float:
        if not both_wait:
            self._is_on = False
            return 0.0
        if not self._is_on:
            self._least = self._most = difference
            self._is_on = True
        self._least, self._most = min(self._least, difference), max(self._most, difference)
        return self._most - self._least


def waiting_lines(world: World, samplers: bool) -> set[Line]:
    """Those left with something that the step could have taken, had there been room."""
    full = {
        tenant
        for tenant, count in Counter(s.tenant_id for s in world.resident_samples).items()
        if count >= world.max_tenant_samples
    }
    return {
        traffic.line
        for traffic in world.lines
        if traffic.is_sampler == samplers
        and traffic.choosable
        and traffic.is_resident
        and not (samplers and traffic.tenant in full)
    }


@pytest.mark.parametrize("samplers", [False, True], ids=["passes", "samples"])
@settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(world=worlds())
def test_tenants_and_lines_that_wait_get_their_share_within_two_requests(samplers: bool, world: World) -> None:
    given_to: Counter[TenantId | Line] = Counter()
    spreads: dict[tuple[object, object], Spread] = defaultdict(Spread)
    largest: dict[TenantId | Line, int] = defaultdict(int)
    for traffic in world.lines:
        largest[traffic.line] = traffic.largest
        if traffic.is_sampler == samplers:
            largest[traffic.tenant] = max(largest[traffic.tenant], traffic.largest)
    for _ in range(STEPS):
        _, _, batch = world.step()
        for op in () if batch is None else batch.samples if samplers else batch.passes:
            given_to[op.tenant_id] += op.cost_tokens
            given_to[line_of(op)] += op.cost_tokens
        lines = waiting_lines(world, samplers)
        tenants = {line.tenant_id for line in lines}
        for a, b in combinations(sorted(world.weights), 2):
            per_weight = {t: given_to[t] / world.weights[t] for t in (a, b)}
            apart = spreads[a, b].see(per_weight[a] - per_weight[b], {a, b} <= tenants)
            assert apart <= sum(largest[t] / world.weights[t] for t in (a, b)) + EPS
        for one, other in combinations(sorted(t.line for t in world.lines if t.is_sampler == samplers), 2):
            if one.tenant_id == other.tenant_id:
                apart = spreads[one, other].see(given_to[one] - given_to[other], {one, other} <= lines)
                assert apart <= largest[one] + largest[other] + EPS


@settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(world=worlds())
def test_who_comes_waits_for_no_more_than_a_request_or_two_of_each_other(world: World) -> None:
    """The first op of a tenant that had nothing to train waits for at most l_m + w_m / w_f l_f tokens of another
    tenant m; the first of a run that had nothing, for at most l_i + l_j of a sibling."""
    since: dict[OpId, tuple[bool, Counter[TenantId | Line]]] = {}
    largest = {t.line: t.largest for t in world.lines}
    by_tenant: dict[TenantId, int] = defaultdict(int)
    for traffic in world.lines:
        if not traffic.is_sampler:
            by_tenant[traffic.tenant] = max(by_tenant[traffic.tenant], traffic.largest)
    runs = [traffic for traffic in world.lines if not traffic.is_sampler]
    for _ in range(STEPS):
        had = {traffic.line for traffic in runs if traffic.choosable}
        candidates, _, batch = world.step()
        heads: dict[Line, Candidate] = {}
        for op in sorted((c for c in candidates if c.run_id is not None), key=lambda c: c.seq_id):
            heads.setdefault(line_of(op), op)
        for line, head in heads.items():
            if head.kind.is_pass and line not in had and head.op_id not in since:
                is_alone = not any(other.tenant_id == line.tenant_id for other in had) and not any(
                    other.tenant_id == line.tenant_id for other in heads if other != line
                )
                since[head.op_id] = is_alone, Counter()
        taken = () if batch is None else batch.passes
        gone = {op.op_id for op in taken}
        for op_id in gone:
            since.pop(op_id, None)
        for op_id, (is_alone, before) in since.items():
            for op in taken:
                before[op.tenant_id] += op.cost_tokens
                before[line_of(op)] += op.cost_tokens
            mine = next(line for line, head in heads.items() if head.op_id == op_id)
            for who, tokens in before.items():
                if isinstance(who, Line) and who.tenant_id == mine.tenant_id:
                    assert tokens <= largest[who] + largest[mine] + EPS
                elif not isinstance(who, Line) and is_alone and who != mine.tenant_id:
                    ratio = world.weights[who] / world.weights[mine.tenant_id]
                    assert tokens <= by_tenant[who] + ratio * by_tenant[mine.tenant_id] + EPS


@settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(world=st.one_of(worlds(), worlds(suspects=True), worlds(moving=True), worlds(suspects=True, moving=True)))
def test_order_limits_and_work_hold_at_every_step(world: World) -> None:
    taken_seq: dict[str, int] = defaultdict(int)
    for _ in range(STEPS):
        absent = {t.name for t in world.lines if not t.is_resident}
        candidates, limits, batch = world.step()
        absent |= {str(c.run_id) for c in candidates if not c.is_resident}
        suspects_wait = any(c.is_suspect and c.run_id is None for c in candidates) and limits.num_samples > 0
        if any(c.run_id is not None for c in candidates) or (candidates and not suspects_wait):
            is_full = all(
                c.run_id is None and limits.tenant_samples.get(c.tenant_id, 0) >= world.max_tenant_samples
                for c in candidates
            )
            assert batch is not None or is_full, "nothing is chosen though something may run"
        if batch is None:
            continue
        check_limits(world, limits, batch, absent)
        for name, ops in by_line(batch):
            seqs = [op.seq_id for op in ops]
            assert seqs == list(range(taken_seq[name] + 1, taken_seq[name] + 1 + len(seqs))), "in the order of its log"
            taken_seq[name] = seqs[-1]
        for traffic in world.lines:
            if batch.passes and not batch.passes[0].is_suspect and traffic.is_resident and traffic.choosable:
                head = traffic.choosable[0]
                room = limits.pass_max_tokens - sum(op.cost_tokens for op in batch.passes)
                rest = [t.choosable[0].cost_tokens for t in world.lines if t.choosable and not t.is_sampler]
                assert traffic.is_sampler or head.is_suspect or max(rest) > room, "room is left, and all would fit"


def check_limits(world: World, limits: Limits, batch: Batch, absent: set[str]) -> None:
    assert not (batch.barriers and batch.passes)
    assert sum(op.cost_tokens for op in batch.passes) <= limits.pass_max_tokens or len(batch.passes) == 1
    assert len(batch.samples) <= limits.max_new_samples
    counts = Counter(limits.tenant_samples)
    counts.update(op.tenant_id for op in batch.samples if not op.is_suspect)
    assert all(count <= world.max_tenant_samples for count in counts.values())
    assert len({op.run_id for op in batch.passes + batch.barriers} & absent) <= limits.max_new_runs
    if any(op.is_suspect for op in batch.ops):
        assert len(batch.ops) == 1, "a suspect runs alone"


def by_line(batch: Batch) -> Iterator[tuple[str, list[Candidate]]]:
    lines: dict[str, list[Candidate]] = defaultdict(list)
    for op in batch.barriers + batch.passes:
        lines[line_of(op).name].append(op)
    yield from lines.items()


def training(tenant: str, run: str, seq: int, cost: int, **how: bool) -> Candidate:
    return Candidate(OpId(f"{run}-{seq}"), TenantId(tenant), RunId(run), OpKind.FORWARD_BACKWARD, seq, cost, **how)


def test_a_large_request_is_not_passed_over_by_small_ones_that_keep_coming() -> None:
    """One that never fits beside a lively neighbour's begins the next pass, of the same tenant, or as soon as another
    tenant has had as much."""
    for large, small, most in (("a", "b", 1000), ("b", "a", 1000), ("a", "a", 20)):
        shares, others = Shares(), 0
        for number in range(200):
            work = [training(small, "small", number, 10), training(large, "large", 0, 995)]
            batch = plan(work, Limits(1000, 8), shares.enter(line_of(op) for op in work))
            assert batch is not None
            shares.took(batch.trained)
            for op in batch.passes:
                shares.charge(op, op.cost_tokens)
            if any(op.run_id == "large" for op in batch.passes):
                break
            others += sum(op.cost_tokens for op in batch.passes)
        else:
            pytest.fail("it starves")
        assert others <= most


def test_a_run_that_floods_leaves_its_sibling_half() -> None:
    shares, tokens = Shares(), Counter[str]()
    for number in range(20):
        work = [training("a", "flood", 100 * number + i, 100) for i in range(50)]
        work += [training("a", "sibling", 100 * number + i, 100) for i in range(50)]
        batch = plan(work, Limits(500, 8), shares.enter(line_of(op) for op in work))
        assert batch is not None
        shares.took(batch.trained)
        for op in batch.passes:
            shares.charge(op, op.cost_tokens)
            tokens[str(op.run_id)] += op.cost_tokens
    assert tokens["flood"] == tokens["sibling"]


def test_who_used_little_for_long_has_saved_nothing_up() -> None:
    shares, tokens = Shares(), Counter[str]()
    for number in range(200):
        light = 1 if number < 100 else 20
        work = [training("heavy", "h", 100 * number + i, 100) for i in range(20)]
        work += [training("light", "l", 100 * number + i, 100) for i in range(light)]
        batch = plan(work, Limits(1000, 8), shares.enter(line_of(op) for op in work))
        assert batch is not None
        shares.took(batch.trained)
        for op in batch.passes:
            shares.charge(op, op.cost_tokens)
            tokens[op.tenant_id] += op.cost_tokens if number >= 100 else 0
    assert abs(tokens["heavy"] - tokens["light"]) <= 200


def test_sampling_while_nobody_else_does_is_not_held_against_training() -> None:
    trained, sampled = Shares(), Shares()
    sample = Candidate(OpId("s"), TenantId("a"), None, OpKind.SAMPLE, 1, 10**6, sampler_id=SamplerId("x"))
    for _ in range(5):
        batch = plan([sample], Limits(1000, 8), sampled=sampled.enter([line_of(sample)]))
        assert batch is not None
        sampled.took(batch.sampled)
        sampled.charge(sample, 10**6)
    work = [training(tenant, tenant, i, 100) for tenant in "ab" for i in range(20)]
    batch = plan(work, Limits(1000, 8), trained.enter(line_of(op) for op in work))
    assert batch is not None
    assert Counter(op.tenant_id for op in batch.passes) == {"a": 5, "b": 5}


@settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6), st.integers(1, 2000), st.data())
def test_every_tenant_gets_its_turn_whatever_was_before(history: list[int], cost: int, data: st.DataObject) -> None:
    """With N tenants at work, each is in one of the next N passes: old hands and newcomers."""
    shares = Shares()
    work = [training(f"t{i}", f"t{i}-{run}", 1, cost) for i in range(len(history)) for run in "ab"]
    for i, tokens in enumerate(history):
        if data.draw(st.booleans()):
            shares.enter([line_of(work[2 * i])])
            shares.charge(work[2 * i], tokens)
    shares.enter(())
    seen: set[TenantId] = set()
    for _ in history:
        batch = plan(work, Limits(1, 8), shares.enter(line_of(op) for op in work))
        assert batch is not None
        shares.took(batch.trained)
        (chosen,) = batch.passes
        shares.charge(chosen, cost)
        seen.add(chosen.tenant_id)
    assert seen == {op.tenant_id for op in work}


def test_absent_runs_of_all_tenants_come_in_by_turns() -> None:
    shares = Shares()
    work = [training("crowd", f"c{i:02}", 1, 10, is_resident=False) for i in range(50)]
    work += [training("one", "z", 1, 10, is_resident=False)]
    standing = shares.enter(line_of(op) for op in work)
    assert "z" in newcomers(work, 2, standing)
    batch = plan(work, Limits(1000, 8, max_new_runs=2), standing)
    assert batch is not None
    assert {op.run_id for op in batch.passes} == {"c00", "z"}


def test_what_is_known_of_those_who_left_is_forgotten() -> None:
    """Samplers come and go by the step; who is gone and has nothing ahead takes no memory."""
    shares = Shares()
    for number in range(2000):
        work = [training("a", f"r{number}", 1, 10), training("b", "flood", number, 10)]
        batch = plan(work, Limits(1000, 8), shares.enter(line_of(op) for op in work))
        assert batch is not None
        shares.took(batch.trained)
        for op in batch.passes:
            shares.charge(op, op.cost_tokens)
    assert sum(len(level.tags) for level in shares._lines.values()) < 300


@settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(
    floods=st.lists(st.tuples(st.integers(1, 1500), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=9),
    small=st.integers(1, 1500),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    budget=st.sampled_from([1, 50, 1000]),
    rng=st.randoms(use_true_random=False),
)
def test_who_asks_anew_whenever_it_is_answered_keeps_the_pace_of_a_fluid_server(
    floods: list[tuple[int, float]], small: int, weight: float, budget: int, rng: random.Random
) -> None:
    """Beside tenants that flood, each request of one that awaits them begins no later than it would in a server that
    serves all at once by their weights, but for one step: what a pass takes, or a largest request."""
    shares, one, rate = Shares(), TenantId("one"), (weight + sum(w for _, w in floods)) / weight
    shares.weigh({one: weight} | {TenantId(f"f{n}"): w for n, (_, w) in enumerate(floods)})
    queues: list[list[Candidate]] = [[] for _ in floods]
    step = max(budget, small, *(most for most, _ in floods))
    served, fluid_end, asked, numbers = 0.0, 0.0, None, count()
    begun: set[TenantId] = set()  # the others have come before
    for number in range(80):
        if asked is None and len(begun) == len(floods) and rng.random() < 0.8:
            asked = training("one", "one", number, rng.randint(1, small))
            begins_by = max(fluid_end, served)
            fluid_end = begins_by + asked.cost_tokens * rate
        for n, (most, _) in enumerate(floods):
            while sum(op.cost_tokens for op in queues[n][1:]) <= budget:
                queues[n].append(training(f"f{n}", f"f{n}", next(numbers), rng.randint(1, most)))
        work = [op for queue in queues for op in queue] + ([] if asked is None else [asked])
        batch = plan(work, Limits(budget, 8), shares.enter(line_of(op) for op in work))
        assert batch is not None
        shares.took(batch.trained)
        for op in batch.passes:
            shares.charge(op, op.cost_tokens)
        if asked in batch.passes:
            asked = None
        assert asked is None or served <= begins_by + step + EPS
        served += sum(op.cost_tokens for op in batch.passes)
        begun |= {op.tenant_id for op in batch.passes} - {one}
        gone = {op.op_id for op in batch.passes}
        queues = [[op for op in queue if op.op_id not in gone] for queue in queues]


def test_a_look_at_nothing_levels_all_who_come_after_it() -> None:
    """What was waited for, and what was had, counts until nobody has anything."""
    ann, bob = Line(TenantId("ann"), "a"), Line(TenantId("bob"), "b")
    op = Candidate(OpId("x"), ann.tenant_id, RunId(ann.name), OpKind.FORWARD_BACKWARD, 1, 10)
    kept, rested = Shares(), Shares()
    for shares in (kept, rested):
        shares.enter([ann, bob])
        shares.took(Turn(0.0, {}, frozenset({ann, bob}), frozenset({ann, bob})))
        shares.charge(op, 10)
    assert kept.enter([ann, bob]).tenants == {ann.tenant_id: 10.0, bob.tenant_id: 0.0}
    nobody = rested.enter([])
    assert (nobody.tenants, nobody.lines, nobody.waiting, nobody.due) == ({}, {}, frozenset(), {})
    level = rested.enter([ann, bob])
    assert len(set(level.tenants.values())) == 1, "both start level"
    assert level.waiting == frozenset(), "nobody has waited"
    assert level.due.keys() == {ann.tenant_id, bob.tenant_id}
