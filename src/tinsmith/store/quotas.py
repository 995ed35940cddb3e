"""The quotas of tenants and keys, and what is used of each.

What is used is never summed over the ledger: the tallies of days and months are written with it (`ledger.meter`), what
is computed now is found by a partial index, and runs and checkpoints are looked up where a request would add to them.
What stays true: a worker's claim is judged within the transaction that makes it, so no number of workers, and no
restart, lets more through than `quota_rules` says. Limits are remembered for `LIMITS_TTL_S`; what is used never is.

What is asked for counts for the key that it came with, and for its tenant.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from sqlalchemy import JSON, Connection, Integer, and_, bindparam, delete, func, insert, or_, select

from tinsmith.errors import NotFoundError, QuotaError
from tinsmith.store.audit import note
from tinsmith.store.database import Database
from tinsmith.store.fences import IS_QUEUED
from tinsmith.store.prepared import Prepared
from tinsmith.store.quota_gates import Gates, Known, Scope, request_of, to_request, under_way
from tinsmith.store.quota_rules import (
    FREE,
    MEANINGS,
    OF_COMPUTING,
    SAVED_PARTS,
    Hold,
    Limits,
    Prices,
    Quota,
    asked,
    day_of,
    month_of,
    never_fits,
)
from tinsmith.store.rows import OpRow, Principal
from tinsmith.store.schema import keys, ops, quotas, tallies, tenants
from tinsmith.types import OpId, OpKind, RunId, SamplerId, TenantId

LIMITS_TTL_S = 1.0
MAX_COUNTED = 10_000
COUNT_PAUSE = 100  # times what counting took
DAYS_KEPT_S, MONTHS_KEPT_S = 3 * 86400, 100 * 86400  # tallies, which no quota asks for after their period

_LIMITS = Prepared(select(quotas.c.tenant_id, quotas.c.scope, quotas.c.quota, quotas.c.amount))
_UNSET = delete(quotas).where(quotas.c.scope == bindparam("of_scope"), quotas.c.quota == bindparam("of_quota"))
_SET = insert(quotas).inline()
_TENANTS = select(tenants.c.tenant_id, tenants.c.name).order_by(tenants.c.name)
_KEY = select(keys.c.key_id, keys.c.name).where(
    keys.c.tenant_id == bindparam("tenant_id"), keys.c.key_id == bindparam("key_id")
)
_KEYS = select(keys.c.key_id, keys.c.name).where(keys.c.tenant_id == bindparam("tenant_id")).order_by(keys.c.created_at)
_OLD = or_(
    and_(func.length(tallies.c.period) == len("2026-01-31"), tallies.c.period < bindparam("day")),
    and_(func.length(tallies.c.period) == len("2026-01"), tallies.c.period < bindparam("month")),
)
_REQUEST = Prepared(
    select(ops.c.tenant_id, ops.c.kind, ops.c.cost_tokens, ops.c.run_id, ops.c.sampler_id, ops.c.key_id).where(
        ops.c.op_id == bindparam("op_id")
    )
)
_WAITING = Prepared(
    select(
        ops.c.tenant_id, ops.c.kind, ops.c.cost_tokens, ops.c.run_id, ops.c.sampler_id, ops.c.key_id, ops.c.seq_id,
        ops.c.created_at,
    )
    .where(
        IS_QUEUED,
        ops.c.tenant_id.in_(select(func.json_each(bindparam("tenant_ids", type_=JSON)).table_valued("value").c.value)),
    )
    .order_by(ops.c.run_id, ops.c.seq_id)  # as the index of the queue has them, which holds nothing that has ended
    .limit(bindparam("most", type_=Integer))
)  # fmt: skip
_FIRST_OF_RUN = Prepared(
    select(ops.c.tenant_id, ops.c.kind, ops.c.cost_tokens, ops.c.run_id, ops.c.sampler_id, ops.c.key_id)
    .where(IS_QUEUED, ops.c.run_id == bindparam("run_id"))
    .order_by(ops.c.seq_id)
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class QuotaUse:
    """The quotas of a tenant, or of one of its keys, and what is used of each now; key_id None: the tenant itself."""

    tenant_name: str
    key_id: str | None
    key_name: str | None
    limits: Limits
    used: Limits


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Waiting ops that a quota holds back. for_long: those for whom that doesn't change by the end of a request.
    shut: tenants who may compute next to nothing for as long."""

    op_ids: Set[OpId] = frozenset()
    for_long: Set[OpId] = frozenset()
    shut: Set[TenantId] = frozenset()


NOTHING_HELD = HeldBack()


class _Turn(Protocol):
    """What decides whose turn it is."""

    @property
    def run_id(self) -> RunId | None: ...

    @property
    def created_at(self) -> float: ...


T = TypeVar("T", bound=_Turn)


class _Waits(NamedTuple):
    """What is looked at of a waiting op where it is only counted."""

    tenant_id: TenantId
    kind: OpKind
    cost_tokens: int
    run_id: RunId | None
    sampler_id: SamplerId | None
    key_id: str | None
    seq_id: int
    created_at: float


class Quotas:
    def __init__(self, database: Database, prices: Prices = FREE) -> None:
        self._database = database
        self._known = Known(prices)
        self._limits: dict[TenantId, dict[str, dict[Quota, float]]] = {}
        self._limits_until = float("-inf")
        self._num_held: Mapping[TenantId, int] = {}
        self._free_since: Mapping[TenantId, float] = {}
        self._count_until = float("-inf")

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
        self._limits_until = self._count_until = float("-inf")

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
                size = self._known.place(conn, run_id, None).adapter_bytes
        ask = asked(kind, num_tokens, size, self._known.prices)
        for owner, scope in (("tenant", by.tenant_id), ("key", by.key_id)):
            larger = never_fits(scopes.get(scope, {}), ask)
            if larger is not None:
                quota, limit = larger
                raise QuotaError(
                    f"this request may take {ask.of(quota):,.10g} of {MEANINGS[quota]}, and the {owner}'s quota "
                    f"{quota} is {limit:,.10g} in all: ask for less, or ask the administrator for more"
                )

    def require_storage(self, by: Principal, num_bytes: int, now: float, conn: Connection | None = None) -> None:
        """For checkpoints that come without a request that could wait. conn: of the transaction that adds them.

        Raises:
            QuotaError: with them the tenant or the key would keep more than its quota of storage.
        """
        scopes = self._current(conn).get(by.tenant_id)
        if not scopes:
            return
        if conn is None:
            with self._database.read() as reading:
                self.require_storage(by, num_bytes, now, reading)
            return
        for owner, scope, key_id in (("tenant", by.tenant_id, None), ("key", by.key_id, by.key_id)):
            limit = scopes.get(scope, {}).get(Quota.STORAGE_BYTES)
            if limit is None:
                continue
            used = Scope(self._known, conn, by.tenant_id, key_id, now).used(Quota.STORAGE_BYTES)
            if used + num_bytes > limit:
                raise QuotaError(
                    f"checkpoints of {num_bytes:,} bytes would come to {used:,.0f} kept, and the {owner}'s "
                    f"quota {Quota.STORAGE_BYTES} is {limit:,.10g}: delete checkpoints, or ask for more"
                )

    def saved_bytes(self, kind: OpKind, run_id: RunId) -> int:
        """Of the file that a save of the run makes."""
        with self._database.read() as conn:
            return self._known.place(conn, run_id, None).adapter_bytes * SAVED_PARTS.get(kind, 0)

    def paused(self, tenant_ids: Iterable[TenantId], now: float) -> set[TenantId]:
        """Those of the tenants that have used up their tokens of today or their money of this month."""
        limited = self._current(None)
        mine = [tenant_id for tenant_id in tenant_ids if tenant_id in (limited.get(tenant_id) or {})]
        if not mine:
            return set()
        with self._database.read() as conn:
            gates = Gates(self._known, conn, limited, now)
            return {tenant_id for tenant_id in mine if gates.is_paused(tenant_id)}

    def held_back(self, waiting: Iterable[OpRow], now: float) -> HeldBack:
        """Those of the waiting ops that may not begin now if the others do. Who came first is let through first, so
        that none of a tenant's own requests keeps another waiting for ever; of each run in the order given."""
        limited = self._current(None)
        if not limited:
            return NOTHING_HELD
        mine = [op for op in waiting if op.tenant_id in limited]
        if not mine:
            return NOTHING_HELD
        op_ids: set[OpId] = set()
        for_long: set[OpId] = set()
        shut: set[TenantId] = set()
        with self._database.read() as conn:
            gates = Gates(self._known, conn, limited, now)
            for op in _in_turn(mine):
                hold = gates.hold(request_of(op))
                if hold is not None:
                    op_ids.add(op.id)
                    if hold.is_lasting:
                        for_long.add(op.id)
                    if hold.is_lasting and hold.owner == "tenant" and hold.quota in OF_COMPUTING:
                        shut.add(op.tenant_id)
        return HeldBack(op_ids, for_long, shut)

    def num_held(self, now: float) -> Mapping[TenantId, int]:
        """How many waiting requests quotas hold back, of at most `MAX_COUNTED` of those who have quotas.
        Looked up so seldom that it takes a hundredth of the time at most."""
        limited = self._current(None)
        if not limited:
            return {}
        started = time.thread_time()
        if time.monotonic() < self._count_until:
            return self._num_held
        with self._database.read() as conn:
            rows = _WAITING.all(conn, {"tenant_ids": list(limited), "most": MAX_COUNTED})
            waiting = [_Waits(*row) for row in rows]
            gates = Gates(self._known, conn, limited, now)
            held, self._free_since = _apart(waiting, lambda op: gates.hold(to_request(op[:6])) is not None)
        self._num_held = Counter(held)
        self._count_until = time.monotonic() + COUNT_PAUSE * (time.thread_time() - started)
        return self._num_held

    def free_since(self, now: float) -> Mapping[TenantId, float | None]:
        """Of each tenant of whose requests `num_held` counts some: when the oldest came that no quota holds back, nor
        one before it in its run; None: all wait for a quota. Unix seconds."""
        return {tenant_id: self._free_since.get(tenant_id) for tenant_id in self.num_held(now)}

    def admissible(self, conn: Connection, op_ids: Sequence[OpId], now: float) -> Sequence[OpId]:
        """Those of the ops that may begin, in the caller's transaction, which claims them."""
        limited = self._current(conn)
        if not limited:
            return op_ids
        gates = Gates(self._known, conn, limited, now)
        found = ((op_id, _REQUEST.first(conn, {"op_id": op_id})) for op_id in op_ids)
        return [op_id for op_id, row in found if row is None or gates.hold(to_request(row)) is None]

    def hold_of(self, op: OpRow, now: float) -> Hold | None:
        """Why a waiting op, or one of its run before it, may not begin now; None: no quota is in its way."""
        limited = self._current(None)
        if op.tenant_id not in limited:
            return None
        with self._database.read() as conn:
            first = None if op.run_id is None else _FIRST_OF_RUN.first(conn, {"run_id": op.run_id})
            before = None if first is None else Gates(self._known, conn, limited, now).explained(to_request(first))
            return before or Gates(self._known, conn, limited, now).explained(request_of(op))

    def forget(self, now: float) -> None:
        """Drop tallies of periods that ended long ago."""
        values = {"day": day_of(now - DAYS_KEPT_S), "month": month_of(now - MONTHS_KEPT_S)}
        with self._database.read() as conn:
            if conn.execute(select(tallies.c.scope).where(_OLD).limit(1), values).first() is None:
                return
        with self._database.write() as conn:
            conn.execute(delete(tallies).where(_OLD), values)

    def _use(
        self,
        conn: Connection,
        tenant_id: TenantId,
        key_id: str | None,
        names: tuple[str, str | None],
        limits: Limits,
        now: float,
    ) -> QuotaUse:
        scope = Scope(self._known, conn, tenant_id, key_id, now)
        busy = under_way(scope.requests(), dict.fromkeys(Quota, 0.0))
        return QuotaUse(
            names[0], key_id, names[1], limits, {quota: scope.used(quota) + _now(busy, quota) for quota in Quota}
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


def _now(busy: Mapping[Quota, float], quota: Quota) -> float:
    """What is computed now counts as used where it ends with it; not where it is yet to be known what it comes to."""
    return busy.get(quota, 0.0) if quota in (Quota.REQUESTS, Quota.QUEUED_TOKENS) else 0.0


def _apart(
    waiting: Sequence[_Waits], is_held: Callable[[_Waits], bool]
) -> tuple[list[TenantId], dict[TenantId, float]]:
    """(the tenant of each that is held back, when each tenant's oldest came that is not)."""
    held: list[TenantId] = []
    free_since: dict[TenantId, float] = {}
    for op in _in_turn(waiting):
        if is_held(op):
            held.append(op.tenant_id)
        else:
            free_since[op.tenant_id] = min(op.created_at, free_since.get(op.tenant_id, op.created_at))
    return held, free_since


def _in_turn(waiting: Sequence[T]) -> list[T]:
    """By their arrival; a run's requests take the turns of that run in the order in which they were given."""
    of_run: dict[RunId | None, list[T]] = defaultdict(list)
    for op in reversed(waiting):
        of_run[op.run_id].append(op)
    turns = sorted(waiting, key=lambda op: op.created_at)
    return [op if op.run_id is None else of_run[op.run_id].pop() for op in turns]
