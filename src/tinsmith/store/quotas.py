"""The quotas of tenants and keys, and what is used of each.

What is used is never summed over the ledger: the tallies of days and months are written with it (`ledger.meter`), what
is computed now is found by a partial index, and runs and checkpoints are looked up where a request would add to them.
What stays true: a worker's claim is judged within the transaction that makes it, so no number of workers, and no
restart, lets more through than `quota_rules` says. Limits are remembered for `LIMITS_TTL_S`; what is used never is.

What is used in a session counts for the key that opened it, and for its tenant.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, bindparam, delete, func, insert, or_, select

from tinsmith.errors import NotFoundError, QuotaError
from tinsmith.store.audit import note
from tinsmith.store.database import Database
from tinsmith.store.fences import IS_QUEUED, IS_RUNNING
from tinsmith.store.prepared import Prepared
from tinsmith.store.quota_rules import (
    FREE,
    MEANINGS,
    MILLION,
    OF_A_PERIOD,
    Asked,
    Gate,
    Hold,
    Limits,
    Prices,
    Quota,
    asked,
    day_of,
    month_of,
    never_fits,
    tokens_of,
)
from tinsmith.store.rows import OpRow, Principal
from tinsmith.store.schema import checkpoints, keys, ops, quotas, runs, samplers, sessions, tallies, tenants
from tinsmith.store.usage_rows import UsageKind
from tinsmith.types import OpId, OpKind, RunId, RunStatus, SamplerId, TenantId

LIMITS_TTL_S = 1.0
MAX_PLACES = 50_000
KEPT_S = 400 * 86400  # of tallies

_LIMITS = Prepared(select(quotas.c.tenant_id, quotas.c.scope, quotas.c.quota, quotas.c.amount))
_UNSET = delete(quotas).where(quotas.c.scope == bindparam("of_scope"), quotas.c.quota == bindparam("of_quota"))
_SET = insert(quotas).inline()
_TENANTS = select(tenants.c.tenant_id, tenants.c.name).order_by(tenants.c.name)
_KEY = select(keys.c.key_id, keys.c.name).where(
    keys.c.tenant_id == bindparam("tenant_id"), keys.c.key_id == bindparam("key_id")
)
_KEYS = select(keys.c.key_id, keys.c.name).where(keys.c.tenant_id == bindparam("tenant_id")).order_by(keys.c.created_at)
_TALLY = Prepared(
    select(tallies.c.kind, tallies.c.quantity).where(
        tallies.c.scope == bindparam("scope"), tallies.c.period == bindparam("period")
    )
)
_OLD = or_(
    and_(func.length(tallies.c.period) == len("2026-01-31"), tallies.c.period < bindparam("day")),
    and_(func.length(tallies.c.period) == len("2026-01"), tallies.c.period < bindparam("month")),
)
_UNDER_WAY = Prepared(
    select(ops.c.kind, ops.c.cost_tokens, ops.c.run_id, ops.c.sampler_id).where(
        IS_RUNNING, ops.c.tenant_id == bindparam("tenant_id")
    )
)
_REQUEST = Prepared(
    select(ops.c.tenant_id, ops.c.kind, ops.c.cost_tokens, ops.c.run_id, ops.c.sampler_id).where(
        ops.c.op_id == bindparam("op_id")
    )
)
_FIRST_OF_RUN = Prepared(
    select(ops.c.tenant_id, ops.c.kind, ops.c.cost_tokens, ops.c.run_id, ops.c.sampler_id)
    .where(IS_QUEUED, ops.c.run_id == bindparam("run_id"))
    .order_by(ops.c.seq_id)
    .limit(1)
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
_OPEN_RUNS = (
    select(sessions.c.key_id, func.count(), func.coalesce(func.sum(runs.c.adapter_bytes), 0))
    .join(runs, runs.c.session_id == sessions.c.session_id)
    .where(
        sessions.c.tenant_id == bindparam("tenant_id"),
        sessions.c.finished_at.is_(None),
        runs.c.status.in_([RunStatus.READY.value, RunStatus.CORRUPTED.value]),
    )
    .group_by(sessions.c.key_id)
)
_STORED = (
    select(sessions.c.key_id, func.sum(checkpoints.c.size_bytes))
    .join(runs, runs.c.run_id == checkpoints.c.run_id)
    .join(sessions, sessions.c.session_id == runs.c.session_id)
    .where(
        checkpoints.c.tenant_id == bindparam("tenant_id"),
        or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > bindparam("now")),
    )
    .group_by(sessions.c.key_id)
)


class _Request(NamedTuple):
    """What is looked at of an op."""

    tenant_id: TenantId
    kind: OpKind
    cost_tokens: int
    run_id: RunId | None
    sampler_id: SamplerId | None


class _Place(NamedTuple):
    """What of a run or sampler never changes. key_id: that opened its session, if that is known."""

    key_id: str | None
    adapter_bytes: int = 0


@dataclass(frozen=True, slots=True)
class QuotaUse:
    """The quotas of a tenant, or of one of its keys, and what is used of each now; key_id None: the tenant itself."""

    tenant_name: str
    key_id: str | None
    key_name: str | None
    limits: Limits
    used: Limits


class Quotas:
    def __init__(self, database: Database, prices: Prices = FREE) -> None:
        self._database = database
        self.prices = prices
        self._limits: dict[TenantId, dict[str, dict[Quota, float]]] = {}
        self._limits_until = float("-inf")
        self._places: dict[str, _Place] = {}

    def put(
        self,
        tenant_id: TenantId,
        key_id: str | None,
        changes: Mapping[Quota, float | None],
        now: float,
        *,
        by: Principal | None = None,
    ) -> None:
        """Set quotas of a tenant, or of one of its keys; None takes one away. `by` stands in the audit log.

        Raises:
            NotFoundError: no such key of this tenant.
        """
        scope = key_id or tenant_id
        with self._database.write() as conn:
            if key_id is not None and conn.execute(_KEY, {"tenant_id": tenant_id, "key_id": key_id}).first() is None:
                raise NotFoundError(f"the tenant has no key {key_id}")
            for quota, amount in changes.items():
                conn.execute(_UNSET, {"of_scope": scope, "of_quota": quota.value})
                if amount is not None:
                    row = {"scope": scope, "quota": quota.value, "tenant_id": tenant_id, "amount": amount}
                    conn.execute(_SET, row)
            told = {quota.value: "none" if amount is None else f"{amount:g}" for quota, amount in changes.items()}
            note(conn, "organization_quota_set", tenant_id, by, {**told, **({"key_id": key_id} if key_id else {})}, now)
        self._limits_until = float("-inf")

    def list(self, now: float, tenant_name: str | None = None) -> Sequence[QuotaUse]:
        """All tenants, or one, each followed by its keys that have quotas."""
        found: list[QuotaUse] = []
        with self._database.read() as conn:
            limits = self._read_limits(conn)
            for tenant_id, name in conn.execute(_TENANTS).all():
                if tenant_name not in (None, name):
                    continue
                scopes = limits.get(tenant_id, {})
                found.append(self._use(conn, tenant_id, None, (name, None), scopes.get(tenant_id, {}), now))
                for key_id, key_name in conn.execute(_KEYS, {"tenant_id": tenant_id}).all():
                    if key_id in scopes:
                        found.append(self._use(conn, tenant_id, key_id, (name, key_name), scopes[key_id], now))
        return found

    def require_fit(self, by: Principal, kind: OpKind, num_tokens: int, run_id: RunId | None, new_bytes: int) -> None:
        """new_bytes: of the adapter that a CREATE is to make.

        Raises:
            QuotaError: the request alone is larger than a quota of the tenant or the key.
        """
        scopes = self._current(None).get(by.tenant_id)
        if not scopes:
            return
        size = new_bytes
        if kind.is_save:
            with self._database.read() as conn:
                size = self.place(conn, run_id, None).adapter_bytes
        ask = asked(kind, num_tokens, size, self.prices)
        for owner, scope in (("tenant", by.tenant_id), ("key", by.key_id)):
            larger = never_fits(scopes.get(scope, {}), ask)
            if larger is not None:
                quota, limit = larger
                raise QuotaError(
                    f"this request may take {ask.of(quota):,.10g} of {MEANINGS[quota]}, and the {owner}'s quota "
                    f"{quota} is {limit:,.10g} in all: ask for less, or ask the administrator for more"
                )

    def paused(self, tenant_ids: Iterable[TenantId], now: float) -> set[TenantId]:
        """Those of the tenants that have used up their tokens of today or their money of this month."""
        limited = self._current(None)
        mine = [tenant_id for tenant_id in tenant_ids if tenant_id in (limited.get(tenant_id) or {})]
        if not mine:
            return set()
        with self._database.read() as conn:
            gates = _Gates(self, conn, limited, now)
            return {tenant_id for tenant_id in mine if gates.is_paused(tenant_id)}

    def held_back(self, waiting: Iterable[OpRow], now: float) -> set[OpId]:
        """Those of the waiting ops that may not begin now if the others do, in this order."""
        limited = self._current(None)
        if not limited:
            return set()
        mine = [op for op in waiting if op.tenant_id in limited]
        if not mine:
            return set()
        with self._database.read() as conn:
            gates = _Gates(self, conn, limited, now)
            return {op.id for op in mine if gates.hold(_request_of(op)) is not None}

    def admissible(self, conn: Connection, op_ids: Sequence[OpId], now: float) -> Sequence[OpId]:
        """Those of the ops that may begin, in the caller's transaction, which claims them."""
        limited = self._current(conn)
        if not limited:
            return op_ids
        gates = _Gates(self, conn, limited, now)
        found = ((op_id, _REQUEST.first(conn, {"op_id": op_id})) for op_id in op_ids)
        return [op_id for op_id, row in found if row is None or gates.hold(_to_request(row)) is None]

    def hold_of(self, op: OpRow, now: float) -> Hold | None:
        """Why a waiting op, or one of its run before it, may not begin now; None: no quota is in its way."""
        limited = self._current(None)
        if op.tenant_id not in limited:
            return None
        with self._database.read() as conn:
            gates = _Gates(self, conn, limited, now)
            first = None if op.run_id is None else _FIRST_OF_RUN.first(conn, {"run_id": op.run_id})
            before = None if first is None else gates.hold(_to_request(first))
            return before or gates.hold(_request_of(op))

    def forget(self, now: float) -> None:
        """Drop tallies of periods that ended long ago."""
        values = {"day": day_of(now - KEPT_S), "month": month_of(now - KEPT_S)}
        with self._database.read() as conn:
            if conn.execute(select(tallies.c.scope).where(_OLD).limit(1), values).first() is None:
                return
        with self._database.write() as conn:
            conn.execute(delete(tallies).where(_OLD), values)

    def place(self, conn: Connection, run_id: RunId | None, sampler_id: SamplerId | None) -> _Place:
        name = run_id or sampler_id or ""
        found = self._places.get(name)
        if found is None:
            row = (
                _OF_SAMPLER.first(conn, {"sampler_id": sampler_id})
                if run_id is None
                else _OF_RUN.first(conn, {"run_id": run_id})
            )
            if row is None:
                return _Place(None)
            if len(self._places) >= MAX_PLACES:
                self._places.clear()
            found = self._places[name] = _Place(*row)
        return found

    def tally(self, conn: Connection, scope: str, period: str) -> dict[UsageKind, int]:
        return {UsageKind(kind): count for kind, count in _TALLY.all(conn, {"scope": scope, "period": period})}

    def _use(
        self,
        conn: Connection,
        tenant_id: TenantId,
        key_id: str | None,
        names: tuple[str, str | None],
        limits: Limits,
        now: float,
    ) -> QuotaUse:
        scope = _Scope(self, conn, tenant_id, key_id, now)
        under_way = _under_way(scope.requests(), dict.fromkeys(Quota, 0.0))
        return QuotaUse(
            names[0], key_id, names[1], limits, {quota: scope.used(quota) + _now(under_way, quota) for quota in Quota}
        )

    def _current(self, conn: Connection | None) -> Mapping[TenantId, dict[str, dict[Quota, float]]]:
        if time.monotonic() > self._limits_until:
            if conn is None:
                with self._database.read() as reading:
                    self._limits = self._read_limits(reading)
            else:
                self._limits = self._read_limits(conn)
            self._limits_until = time.monotonic() + LIMITS_TTL_S
        return self._limits

    def _read_limits(self, conn: Connection) -> dict[TenantId, dict[str, dict[Quota, float]]]:
        limits: dict[TenantId, dict[str, dict[Quota, float]]] = {}
        for tenant_id, scope, quota, amount in _LIMITS.all(conn, {}):
            limits.setdefault(tenant_id, {}).setdefault(scope, {})[Quota(quota)] = amount
        return limits


@dataclass(slots=True)
class _Scope:
    """What a tenant, or one of its keys, uses at one moment; looked up when it is asked for, once."""

    quotas: Quotas
    conn: Connection
    tenant_id: TenantId
    key_id: str | None
    now: float
    _used: dict[Quota, float] = field(default_factory=dict)

    def used(self, quota: Quota) -> float:
        """By what has ended."""
        if quota not in self._used:
            self._used[quota] = self._look_up(quota)
        return self._used[quota]

    def requests(self) -> list[Asked]:
        """Those that are computed."""
        found = [_Request(self.tenant_id, *row) for row in _UNDER_WAY.all(self.conn, {"tenant_id": self.tenant_id})]
        return [self.ask(request) for request in found if self.counts(request)]

    def counts(self, request: _Request) -> bool:
        """Whether the request is of this scope."""
        if self.key_id is None:
            return True
        return self.quotas.place(self.conn, request.run_id, request.sampler_id).key_id == self.key_id

    def ask(self, request: _Request) -> Asked:
        kind = OpKind(request.kind)
        has_bytes = kind is OpKind.CREATE or kind.is_save
        size = self.quotas.place(self.conn, request.run_id, None).adapter_bytes if has_bytes else 0
        return asked(kind, request.cost_tokens, size, self.quotas.prices)

    def _look_up(self, quota: Quota) -> float:
        scope = self.key_id or self.tenant_id
        match quota:
            case Quota.TOKENS_PER_DAY:
                return tokens_of(self.quotas.tally(self.conn, scope, day_of(self.now)))
            case Quota.USD_PER_MONTH:
                return self.quotas.prices.of(self.quotas.tally(self.conn, scope, month_of(self.now)))
            case Quota.RUNS | Quota.ADAPTER_BYTES:
                column = 1 if quota is Quota.RUNS else 2
                rows = self.conn.execute(_OPEN_RUNS, {"tenant_id": self.tenant_id}).all()
            case Quota.STORAGE_BYTES:
                column = 1
                rows = self.conn.execute(_STORED, {"tenant_id": self.tenant_id, "now": self.now}).all()
            case _:
                return 0.0
        return float(sum(row[column] for row in rows if self.key_id in (None, row[0])))


class _Gates:
    """Of one look or claim: a gate for each tenant and key that is concerned."""

    def __init__(
        self,
        quotas_: Quotas,
        conn: Connection,
        limited: Mapping[TenantId, Mapping[str, Limits]],
        now: float,
    ) -> None:
        self._quotas, self._conn, self._limited, self._now = quotas_, conn, limited, now
        self._gates: dict[TenantId, list[tuple[_Scope, Gate]]] = {}
        self._stopped: dict[RunId, Hold] = {}

    def hold(self, request: _Request) -> Hold | None:
        """Why it may not begin; None: it counts as under way from now on."""
        if request.tenant_id not in self._limited:
            return None
        if request.run_id is not None and request.run_id in self._stopped:
            return self._stopped[request.run_id]
        concerned = [(scope, gate) for scope, gate in self._of(request.tenant_id) if scope.counts(request)]
        if not concerned:
            return None
        ask = concerned[0][0].ask(request)
        for _, gate in concerned:
            hold = gate.hold(ask)
            if hold is not None:
                if request.run_id is not None:
                    self._stopped[request.run_id] = hold
                return hold
        for _, gate in concerned:
            gate.begin(ask)
        return None

    def is_paused(self, tenant_id: TenantId) -> bool:
        token = Asked(requests=0, tokens=1, usd=1 / MILLION)
        holds = [gate.hold(token) for scope, gate in self._of(tenant_id) if scope.key_id is None]
        return any(hold is not None and hold.quota in OF_A_PERIOD for hold in holds)

    def _of(self, tenant_id: TenantId) -> list[tuple[_Scope, Gate]]:
        found = self._gates.get(tenant_id)
        if found is None:
            found = self._gates[tenant_id] = [
                self._gate(tenant_id, None if scope == tenant_id else scope, limits)
                for scope, limits in self._limited[tenant_id].items()
            ]
        return found

    def _gate(self, tenant_id: TenantId, key_id: str | None, limits: Limits) -> tuple[_Scope, Gate]:
        scope = _Scope(self._quotas, self._conn, tenant_id, key_id, self._now)
        owner = "tenant" if key_id is None else "key"
        return scope, Gate(limits, scope.used, _under_way(scope.requests(), limits), owner)


def _under_way(requests: Iterable[Asked], limits: Limits) -> dict[Quota, float]:
    gate = Gate(limits)
    for ask in requests:
        gate.begin(ask)
    return gate.under_way


def _now(under_way: Mapping[Quota, float], quota: Quota) -> float:
    """What is computed now counts as used where it ends with it; not where it is yet to be known what it comes to."""
    return under_way.get(quota, 0.0) if quota in (Quota.REQUESTS, Quota.QUEUED_TOKENS) else 0.0


def _request_of(op: OpRow) -> _Request:
    return _Request(op.tenant_id, op.kind, op.cost_tokens, op.run_id, op.sampler_id)


def _to_request(row: Sequence[Any]) -> _Request:
    return _Request(*row)
