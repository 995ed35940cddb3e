"""What a tenant or key uses now, and the gate that each request has to pass. Within the caller's transaction.

Looked up are only the quotas that a request takes part of: the tally of the day or month by its key, what is computed
now by a partial index, runs by the sessions that live and those that were trained since theirs ended, checkpoints by
their tenant. A request counts for the key that it came with; a run for the one that made it or opened it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sqlalchemy import JSON, Connection, bindparam, exists, func, or_, select, update

from tinsmith.store.fences import IS_RUNNING
from tinsmith.store.prepared import Prepared
from tinsmith.store.quota_rules import (
    MILLION,
    OF_A_PERIOD,
    OF_RUNS,
    REOPENED_S,
    Asked,
    Gate,
    Hold,
    Limits,
    Prices,
    Quota,
    asked,
    day_of,
    month_of,
    tokens_of,
)
from tinsmith.store.rows import OpRow
from tinsmith.store.schema import checkpoints, ops, runs, samplers, sessions, tallies
from tinsmith.store.usage_rows import UsageKind
from tinsmith.types import OpKind, RunId, RunStatus, SamplerId, TenantId

MAX_PLACES = 50_000

_TALLY = Prepared(
    select(tallies.c.kind, tallies.c.quantity).where(
        tallies.c.scope == bindparam("scope"), tallies.c.period == bindparam("period")
    )
)
_UNDER_WAY = Prepared(
    select(ops.c.kind, ops.c.cost_tokens, ops.c.run_id, ops.c.sampler_id, ops.c.key_id).where(
        IS_RUNNING, ops.c.tenant_id == bindparam("tenant_id")
    )
)
_OF_RUN = Prepared(
    select(sessions.c.key_id, runs.c.adapter_bytes)
    .join(runs, runs.c.session_id == sessions.c.session_id)
    .where(runs.c.run_id == bindparam("run_id"))
)
_OF_SAMPLER = Prepared(
    select(sessions.c.key_id)
    .join(samplers, samplers.c.session_id == sessions.c.session_id)
    .where(samplers.c.sampler_id == bindparam("sampler_id"))
)
_RUNS = (
    select(runs.c.key_id, func.count(), func.coalesce(func.sum(runs.c.adapter_bytes), 0))
    .join(sessions, sessions.c.session_id == runs.c.session_id)
    .where(runs.c.status.in_([RunStatus.READY.value, RunStatus.CORRUPTED.value]))
    .group_by(runs.c.key_id)
)
_OPEN_RUNS = _RUNS.where(sessions.c.tenant_id == bindparam("tenant_id"), sessions.c.finished_at.is_(None))
_REOPENED_RUNS = _RUNS.where(
    runs.c.tenant_id == bindparam("tenant_id"),
    runs.c.reopened_at.is_not(None),
    runs.c.reopened_at > bindparam("since"),
    sessions.c.finished_at.is_not(None),
)
_IS_OPEN = Prepared(
    select(sessions.c.finished_at, runs.c.reopened_at)
    .join(runs, runs.c.session_id == sessions.c.session_id)
    .where(runs.c.run_id == bindparam("run_id"))
)
_REOPEN = Prepared(
    update(runs)
    .where(
        runs.c.run_id.in_(select(func.json_each(bindparam("run_ids", type_=JSON)).table_valued("value").c.value)),
        exists().where(sessions.c.session_id == runs.c.session_id, sessions.c.finished_at.is_not(None)).correlate(runs),
        or_(runs.c.reopened_at.is_(None), runs.c.reopened_at < bindparam("stale")),
    )
    .values(reopened_at=bindparam("now"))
    .returning(runs.c.run_id)
)
_COUNT_FOR = Prepared(update(runs).where(runs.c.run_id == bindparam("of_run")).values(key_id=bindparam("key")))
_STORED = (
    select(checkpoints.c.key_id, func.sum(checkpoints.c.size_bytes))
    .where(
        checkpoints.c.tenant_id == bindparam("tenant_id"),
        or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > bindparam("now")),
    )
    .group_by(checkpoints.c.key_id)
)
_EXPIRING = (
    select(checkpoints.c.key_id, checkpoints.c.size_bytes, checkpoints.c.expires_at)
    .where(checkpoints.c.tenant_id == bindparam("tenant_id"), checkpoints.c.expires_at > bindparam("now"))
    .order_by(checkpoints.c.expires_at)
)


class Request(NamedTuple):
    """What is looked at of an op."""

    tenant_id: TenantId
    kind: OpKind
    cost_tokens: int
    run_id: RunId | None
    sampler_id: SamplerId | None
    key_id: str | None = None


class Place(NamedTuple):
    """What of a run or sampler never changes. key_id: that opened its session, if that is known; requests of before
    their own was kept count for that one."""

    key_id: str | None
    adapter_bytes: int = 0


class Known:
    """What is remembered between looks: prices, and what of runs and samplers never changes."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self._places: dict[str, Place] = {}

    def place(self, conn: Connection, run_id: RunId | None, sampler_id: SamplerId | None) -> Place:
        name = run_id or sampler_id or ""
        found = self._places.get(name)
        if found is None:
            row = (
                _OF_SAMPLER.first(conn, {"sampler_id": sampler_id})
                if run_id is None
                else _OF_RUN.first(conn, {"run_id": run_id})
            )
            if row is None:
                return Place(None)
            if len(self._places) >= MAX_PLACES:
                self._places.clear()
            found = self._places[name] = Place(*row)
        return found


def tally(conn: Connection, scope: str, period: str) -> dict[UsageKind, int]:
    """What the ledger has of a tenant or key in a day or month."""
    return {UsageKind(kind): count for kind, count in _TALLY.all(conn, {"scope": scope, "period": period})}


@dataclass(slots=True)
class Scope:
    """What a tenant, or one of its keys, uses at one moment; looked up when it is asked for, once. minds_runs: there is
    a quota for which it has to be known whether a run is open."""

    known: Known
    conn: Connection
    tenant_id: TenantId
    key_id: str | None
    now: float
    minds_runs: bool = True
    _used: dict[Quota, float] = field(default_factory=dict)
    _is_open: dict[RunId, bool] = field(default_factory=dict)

    def used(self, quota: Quota) -> float:
        """By what has ended."""
        if quota not in self._used:
            self._used[quota] = self._look_up(quota)
        return self._used[quota]

    def requests(self) -> list[Asked]:
        """Those that are computed."""
        begun: set[RunId] = set()
        asks: list[Asked] = []
        for row in _UNDER_WAY.all(self.conn, {"tenant_id": self.tenant_id}):
            request = Request(self.tenant_id, *row)
            if self.counts(request):
                asks.append(self.ask(request, begun))
                begun |= {request.run_id} if request.run_id is not None else set()
        return asks

    def counts(self, request: Request) -> bool:
        """Whether the request is of this scope."""
        if self.key_id is None:
            return True
        key_id = request.key_id or self.known.place(self.conn, request.run_id, request.sampler_id).key_id
        return key_id == self.key_id

    def ask(self, request: Request, begun: Set[RunId] = frozenset()) -> Asked:
        """begun: runs of which another request counts already."""
        kind, run_id = OpKind(request.kind), request.run_id
        takes_run = (
            run_id is not None and run_id not in begun and (kind is OpKind.CREATE or not self._is_run_open(run_id))
        )
        size = self.known.place(self.conn, run_id, None).adapter_bytes if takes_run or kind.is_save else 0
        return asked(kind, request.cost_tokens, size, self.known.prices, takes_run=takes_run)

    def storage_frees_at(self, num_bytes: float) -> float | None:
        """When checkpoints of so many bytes will have expired, in unix seconds; None: not so many expire."""
        for key_id, size, expires_at in self.conn.execute(_EXPIRING, {"tenant_id": self.tenant_id, "now": self.now}):
            num_bytes -= size if self.key_id in (None, key_id) else 0
            if num_bytes <= 0:
                return float(expires_at)
        return None

    def _is_run_open(self, run_id: RunId) -> bool:
        if not self.minds_runs:
            return True
        if run_id not in self._is_open:
            row = _IS_OPEN.first(self.conn, {"run_id": run_id})
            finished_at, reopened_at = row or (None, None)
            self._is_open[run_id] = finished_at is None or (reopened_at or 0.0) > self.now - REOPENED_S
        return self._is_open[run_id]

    def _look_up(self, quota: Quota) -> float:
        scope = self.key_id or self.tenant_id
        match quota:
            case Quota.TOKENS_PER_DAY:
                return tokens_of(tally(self.conn, scope, day_of(self.now)))
            case Quota.USD_PER_MONTH:
                return self.known.prices.of(tally(self.conn, scope, month_of(self.now)))
            case Quota.RUNS | Quota.ADAPTER_BYTES:
                column = 1 if quota is Quota.RUNS else 2
                since = {"tenant_id": self.tenant_id, "since": self.now - REOPENED_S}
                rows = [row for query in (_OPEN_RUNS, _REOPENED_RUNS) for row in self.conn.execute(query, since)]
            case Quota.STORAGE_BYTES:
                column = 1
                rows = list(self.conn.execute(_STORED, {"tenant_id": self.tenant_id, "now": self.now}))
            case _:
                return 0.0
        return float(sum(row[column] for row in rows if self.key_id in (None, row[0])))


class Gates:
    """Of one look or claim: a gate for each tenant and key that is concerned."""

    def __init__(
        self,
        known: Known,
        conn: Connection,
        limited: Mapping[TenantId, Mapping[str, Limits]],
        now: float,
    ) -> None:
        self._known, self._conn, self._limited, self._now = known, conn, limited, now
        self._gates: dict[TenantId, list[tuple[Scope, Gate]]] = {}
        self._stopped: dict[RunId, Hold] = {}
        self._shut: dict[TenantId, Hold] = {}  # whatever they ask for
        self._no_tokens: dict[TenantId, Hold] = {}  # if it takes any
        self._begun: set[RunId] = set()  # of which a request is under way

    def hold(self, request: Request) -> Hold | None:
        """Why it may not begin; None: it counts as under way from now on."""
        if request.tenant_id not in self._limited:
            return None
        hold = self._known_hold(request) or self._new_hold(request)
        if hold is not None and request.run_id is not None:
            self._stopped[request.run_id] = hold
        return hold

    def explained(self, request: Request) -> Hold | None:
        """`hold`, and when what is lacking of storage is given back by itself."""
        hold = self.hold(request)
        if hold is None or hold.quota is not Quota.STORAGE_BYTES:
            return hold
        scopes = (scope for scope, gate in self._of(request.tenant_id) if gate.owner == hold.owner)
        scope = next(scope for scope in scopes if scope.counts(request))
        return replace(hold, frees_at=scope.storage_frees_at(hold.lacking))

    def _known_hold(self, request: Request) -> Hold | None:
        """What held back others before it. A crowd that waits costs little at each look."""
        if request.tenant_id in self._shut:
            return self._shut[request.tenant_id]
        if request.cost_tokens and request.tenant_id in self._no_tokens:
            return self._no_tokens[request.tenant_id]
        return None if request.run_id is None else self._stopped.get(request.run_id)

    def _new_hold(self, request: Request) -> Hold | None:
        concerned = [(scope, gate) for scope, gate in self._of(request.tenant_id) if scope.counts(request)]
        if not concerned:
            return None
        ask = concerned[0][0].ask(request, self._begun)
        for scope, gate in concerned:
            hold = gate.hold(ask)
            if hold is not None:
                if scope.key_id is None and hold.quota is Quota.REQUESTS:
                    self._shut[request.tenant_id] = hold
                elif scope.key_id is None and hold.quota in (Quota.QUEUED_TOKENS, Quota.TOKENS_PER_DAY):
                    self._no_tokens[request.tenant_id] = hold
                return hold
        for _, gate in concerned:
            gate.begin(ask)
        self._begun |= {request.run_id} if request.run_id is not None else set()
        return None

    def is_paused(self, tenant_id: TenantId) -> bool:
        token = Asked(requests=0, tokens=1, usd=1 / MILLION)
        holds = [gate.hold(token) for scope, gate in self._of(tenant_id) if scope.key_id is None]
        return any(hold is not None and hold.quota in OF_A_PERIOD for hold in holds)

    def _of(self, tenant_id: TenantId) -> list[tuple[Scope, Gate]]:
        found = self._gates.get(tenant_id)
        if found is None:
            found = self._gates[tenant_id] = [
                self._gate(tenant_id, None if scope == tenant_id else scope, limits)
                for scope, limits in self._limited[tenant_id].items()
            ]
        return found

    def _gate(self, tenant_id: TenantId, key_id: str | None, limits: Limits) -> tuple[Scope, Gate]:
        minds_runs = any(not limits.keys().isdisjoint(OF_RUNS) for limits in self._limited[tenant_id].values())
        scope = Scope(self._known, self._conn, tenant_id, key_id, self._now, minds_runs)
        owner = "tenant" if key_id is None else "key"
        return scope, Gate(limits, scope.used, under_way(scope.requests(), limits), owner)


def under_way(requests: Iterable[Asked], limits: Limits) -> dict[Quota, float]:
    gate = Gate(limits)
    for ask in requests:
        gate.begin(ask)
    return gate.under_way


def reopen(conn: Connection, claimed: Iterable[OpRow], now: float) -> None:
    """Requests are begun: their runs whose session has ended are open again, for whoever asked."""
    keys = {op.run_id: op.key_id for op in claimed if op.run_id is not None}
    if keys:
        values = {"run_ids": list(keys), "now": now, "stale": now - REOPENED_S / 4}
        for (run_id,) in _REOPEN.all(conn, values):
            if keys[run_id] is not None:
                _COUNT_FOR.run(conn, {"of_run": run_id, "key": keys[run_id]})


def request_of(op: OpRow) -> Request:
    return Request(op.tenant_id, op.kind, op.cost_tokens, op.run_id, op.sampler_id, op.key_id)


def to_request(row: Sequence[Any]) -> Request:
    return Request(*row)
