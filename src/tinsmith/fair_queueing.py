"""Fair queueing in two levels: between tenants by weight, and between the lines of a tenant. Pure.

Every tenant, and within it every line (a run, or a sampler), has a tag: the virtual time at which its next op starts.
An op of c tokens moves its tenant's tag on by c / weight, and its line's by c. The tenant is next whose op starts
first, of equals the one whose op ends first, so that a small one needn't wait for a round of large ones; then its line
whose op starts first. Who had nothing waiting starts at the clock, which is the start tag of who is next of those that
wait, or of what was taken last: so nobody saves up turns by being idle, nobody pays for what was taken while nobody
waited, and who comes is next. Where nothing was left waiting, all are level again.

By start tags alone, one who comes back soon, its tag a little ahead of the clock, waits for one of the largest of
everybody who is still at the clock, though it asked for little. So a fluid server runs beside (`Fluid`), which serves
all at once by their weights: who comes to it waits until it would be begun there, and is then due: put at the clock,
and the first of those that are there. Once each time that it comes with nothing waiting, and what it waited beside
others that came so isn't made up for, so that the bounds stay.

Bounds (Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM 1996; for levels above one another, Bennett and Zhang,
"Hierarchical Packet Fair Queueing", SIGCOMM 1996), with l the largest op of one and w its weight:

* Share (their theorem 1, whatever breaks ties). Of two that both wait all the time, W_f / w_f and W_m / w_m, the tokens
  taken of each by weight, differ by at most l_f / w_f + l_m / w_m, over any interval. Of two lines of a tenant, W_i and
  W_j by at most l_i + l_j.
* Delay. Before the op of a tenant f that had nothing waiting, at most l_m + w_m / w_f l_f tokens of each other tenant m
  are taken; before that of a line, at most its sibling's largest op and its own.
* Pace. Such an op that is alone at the clock when it becomes due is the next that is taken: it begins no later than in
  the fluid server, but for the largest op of anybody (Bennett and Zhang, "WF2Q: Worst-case Fair Weighted Fair
  Queueing", INFOCOM 1996, for whom this holds of all ops).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from tinsmith.types import RunId, SamplerId, TenantId

K = TypeVar("K", bound=Hashable)
SPARE = 64  # tags that are kept though they say nothing any more, before it is looked for those


class Line(NamedTuple):
    """What of a tenant's takes turns: a run's ops, or a sampler's. `name` is its id."""

    tenant_id: TenantId
    name: str


class Queued(Protocol):
    """An op, as far as it says whose it is."""

    @property
    def tenant_id(self) -> TenantId: ...
    @property
    def run_id(self) -> RunId | None: ...
    @property
    def sampler_id(self) -> SamplerId | None: ...


def line_of(op: Queued) -> Line:
    return Line(op.tenant_id, op.run_id or op.sampler_id or "")


@dataclass(frozen=True, slots=True)
class Standing:
    """One moment's tags. Who isn't named has none yet; a weight that isn't named is 1.

    waiting: lines that were left with an op for which there was no room; of equals they go first.
    due: tenants whose turn has come by the fluid server, and the order in which it has.
    """

    tenants: Mapping[TenantId, float] = field(default_factory=dict)
    lines: Mapping[Line, float] = field(default_factory=dict)
    weights: Mapping[TenantId, float] = field(default_factory=dict)
    waiting: AbstractSet[Line] = frozenset()
    due: Mapping[TenantId, int] = field(default_factory=dict)

    def weight(self, tenant_id: TenantId) -> float:
        return self.weights.get(tenant_id, 1.0)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a choice did to the virtual time.

    clock, clocks: of all and of each tenant, the start tag of what was taken last, or was next when there was no more
    room. offered: the lines that were looked at. waiting: those of them that were left with something to choose.
    """

    clock: float = 0.0
    clocks: Mapping[TenantId, float] = field(default_factory=dict)
    offered: AbstractSet[Line] = frozenset()
    waiting: AbstractSet[Line] = frozenset()


class Fluid(Generic[K]):
    """A server that serves all who have anything at once, by weight (Parekh and Gallager 1993), in its virtual time.

    It is told what was taken, of whom; its clock moves on by that over the weights of all who have anything.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[K, float] = {}  # when all that was taken of one has been served
        self._load = 1.0

    def enter(self, comers: Iterable[K], active: AbstractSet[K], weights: Mapping[K, float]) -> None:
        """Some come with nothing waiting. active: all who have anything now."""
        self._ends = {key: end for key, end in self._ends.items() if end > self._now or key in active}
        for key in comers:
            self._ends[key] = max(self._ends.get(key, 0.0), self._now)
        self._load = sum(weights.get(key, 1.0) for key in self._ends.keys() | active) or 1.0

    def is_due(self, key: K) -> bool:
        """Whether what it came with would be begun by now."""
        return self._ends.get(key, 0.0) <= self._now

    def charge(self, key: K, amount: float, weight: float, *, from_now: bool = False) -> None:
        """from_now: what it waited for is not made up."""
        end = self._ends.get(key, self._now)
        self._ends[key] = (max(end, self._now) if from_now else end) + amount / weight
        self._now += amount / self._load

    def rest(self) -> None:
        """Nobody waits: all start level after it."""
        self._ends.clear()


class _Level(Generic[K]):
    """Tags of those who share one thing, and its clock."""

    def __init__(self) -> None:
        self.tags: dict[K, float] = {}
        self.start = 0.0  # of who comes
        self._clock = 0.0

    def enter(self, active: AbstractSet[K], waiting: AbstractSet[K], busy: AbstractSet[K] = frozenset()) -> None:
        """Those of the active who did not wait start at the clock. busy: whose tags are kept beside theirs."""
        level = self.start = min((self.tags[key] for key in waiting), default=self._clock)
        if len(self.tags) > 2 * (len(active) + len(busy)) + SPARE:
            kept = active | busy
            self.tags = {key: tag for key, tag in self.tags.items() if key in kept or tag > level}
        for key in active - waiting:
            self.tags[key] = max(self.tags.get(key, level), level)

    def advance(self, clock: float) -> None:
        self._clock = max(self._clock, clock)

    def charge(self, key: K, amount: float) -> None:
        self.tags[key] = self.tags.get(key, self._clock) + amount

    def rest(self) -> None:
        """Nobody waits: all start level after it."""
        self._clock = max([self._clock, *self.tags.values()])
        self.tags.clear()


class Shares:
    """What tenants and their lines have had of one thing, in virtual time. It knows neither clocks nor rows."""

    def __init__(self) -> None:
        self._tenants: _Level[TenantId] = _Level()
        self._lines: dict[TenantId, _Level[Line]] = {}
        self._waiting: frozenset[Line] = frozenset()
        self._entered: frozenset[Line] = frozenset()
        self._weights: Mapping[TenantId, float] = {}
        self._fluid: Fluid[TenantId] = Fluid()
        self._fresh: frozenset[TenantId] = frozenset()  # who came with nothing waiting, until something of it is taken
        self._due: dict[TenantId, int] = {}
        self._num_due = 0

    def weigh(self, weights: Mapping[TenantId, float]) -> None:
        """From now on tenants have these weights, above 0; those that are not named have 1."""
        self._weights = weights

    def enter(self, lines: Iterable[Line], busy: AbstractSet[TenantId] = frozenset()) -> Standing:
        """The tags of all lines that have something to choose from. busy: tenants of whom something is under way."""
        active = frozenset(lines)
        self._entered = active
        tenants = frozenset(line.tenant_id for line in active)
        self._waiting = frozenset(line for line in self._waiting if line in active or line.tenant_id in busy)
        stayed = frozenset(line.tenant_id for line in self._waiting)
        if not stayed:
            self._tenants.rest()
            self._fluid.rest()
        if not active and not stayed:
            return self._nobody(busy)
        self._lines = {tenant: level for tenant, level in self._lines.items() if tenant in stayed}
        self._tenants.enter(tenants, stayed & tenants, busy)
        self._enter_fluid(tenants, tenants - stayed, busy)
        tags: dict[Line, float] = {}
        own: dict[TenantId, set[Line]] = {tenant: set() for tenant in tenants}
        for line in active:
            own[line.tenant_id].add(line)
        for tenant, mine in own.items():
            level = self._lines.setdefault(tenant, _Level())
            level.enter(mine, self._waiting & mine)
            tags.update((line, level.tags[line]) for line in mine)
        due = {tenant: number for tenant, number in self._due.items() if tenant in tenants}
        return Standing({t: self._tenants.tags[t] for t in tenants}, tags, self._weights, self._waiting, due)

    def _nobody(self, busy: AbstractSet[TenantId]) -> Standing:
        """What `enter` comes to where no line has anything and none has waited: most of the looks at an idle queue."""
        self._lines, self._fresh, self._due = {}, frozenset(), {}
        self._tenants.enter(frozenset(), frozenset(), busy)
        self._fluid.enter((), busy, self._weights)
        self._num_due += 1
        return Standing(weights=self._weights)

    def _enter_fluid(
        self, tenants: AbstractSet[TenantId], comers: AbstractSet[TenantId], busy: AbstractSet[TenantId]
    ) -> None:
        self._fluid.enter(comers - self._fresh, tenants | busy, self._weights)
        self._fresh = (self._fresh & tenants) | comers
        self._due = {tenant: number for tenant, number in self._due.items() if tenant in self._fresh}
        self._num_due += 1
        for tenant in self._fresh - self._due.keys():
            if self._fluid.is_due(tenant):
                self._due[tenant] = self._num_due
                self._tenants.tags[tenant] = self._tenants.start

    def took(self, turn: Turn) -> None:
        """A choice was made from the last standing; who stood there and was offered nothing waits, too."""
        self._waiting |= self._entered
        self._waiting = (self._waiting - turn.offered) | turn.waiting
        self._tenants.advance(turn.clock)
        for tenant, clock in turn.clocks.items():
            if tenant in self._lines:
                self._lines[tenant].advance(clock)

    def charge(self, op: Queued, num_tokens: float) -> None:
        """So many tokens are computed for it; a negative number gives back what was charged too much."""
        line = line_of(op)
        weight = self._weights.get(line.tenant_id, 1.0)
        self._tenants.charge(line.tenant_id, num_tokens / weight)
        self._fluid.charge(line.tenant_id, num_tokens, weight, from_now=bool(self._fresh - {line.tenant_id}))
        if num_tokens > 0:
            self._fresh -= {line.tenant_id}
            self._due.pop(line.tenant_id, None)
        if line.tenant_id in self._lines:
            self._lines[line.tenant_id].charge(line, num_tokens)
