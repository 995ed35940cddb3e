"""What waits to be run, as the worker has seen it: kept between looks, so that a look costs what is new.

The rows are the truth. The view may name an op that isn't queued any more, which the claim then leaves out; it must
never miss one for long. Hence it is read anew as a whole whenever something may have become runnable other than by
arriving, and in any case every `scan_interval_s`.

Ops that a quota holds back are kept out of sight, with what comes after them in their run. Each look judges anew, so
they come back when the quota allows it; those that no request's end lets go are left alone until all is read again, so
that they cost the others nothing, and so is what comes of a tenant whose budget is used up. What else comes of their
tenant is seen at once: a run that waits for its place slows down none of its siblings.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence

from tinsmith.store import Store
from tinsmith.store.rows import OpRow, WorkerId
from tinsmith.types import OpId, OpKind, Role, RunId, TenantId

LOOK_AT_MOST = 4096


class QueueView:
    def __init__(self, me: WorkerId, base: str, store: Store, scan_interval_s: float, role: Role) -> None:
        self._me = me
        self._base = base
        self._store = store
        self._scan_interval_s = scan_interval_s
        self._role = role
        self._ops: dict[OpId, OpRow] = {}
        self._newest = 0
        self._read_at = float("-inf")
        self._held: set[OpId] = set()
        self._shut: set[TenantId] = set()  # of whom nothing is looked at until all is read again
        self._parked: set[TenantId] = set()  # of whom some ops are left alone as long
        self._parked_runs: set[RunId] = set()  # those of these ops
        self._offered: list[OpRow] | None = None  # all but those; None: not made yet

    @property
    def ops(self) -> Collection[OpRow]:
        """Of each run in the order of its log; samples in the order of their arrival. None that a quota holds back."""
        if not self._held:
            return self._ops.values()
        if self._offered is None:
            self._offered = [op for op in self._ops.values() if op.id not in self._held]
        return self._offered

    @property
    def has_held(self) -> bool:
        """Whether quotas hold back any that may begin when another request of their tenant has ended."""
        return bool(self._held)

    @property
    def num_samples(self) -> int:
        return sum(op.kind is OpKind.SAMPLE for op in self._ops.values())

    def distrust(self) -> None:
        """Something was queued again, or may run now though it is old: read all at the next look."""
        self._read_at = float("-inf")

    def remove(self, op_ids: Iterable[OpId]) -> None:
        """These were claimed, or can't be."""
        for op_id in op_ids:
            self._ops.pop(op_id, None)
        self._offered = None

    def hold_back(self, op_ids: Iterable[OpId]) -> None:
        """These could not be claimed: they have gone, or a quota is used up. They are out of sight until the next look,
        which reads all, and what comes after them in their runs with them."""
        refused = [op for op_id in op_ids if (op := self._ops.get(op_id)) is not None]
        run_ids = {op.run_id for op in refused if op.run_id is not None}
        self._held |= {op.id for op in refused}
        self._held |= {op.id for op in self._ops.values() if op.run_id in run_ids}
        self._offered = None
        self.distrust()

    def has_told(self, ops: Sequence[OpRow]) -> bool:
        """These have come, each the next of its run. False: a look is due, or they wait for what nobody told of."""
        is_old = time.monotonic() - self._read_at > self._scan_interval_s
        if is_old or self._held or any(op.tenant_id in self._parked for op in ops):
            return False
        self._ops.update((op.id, op) for op in ops)
        self._offered = None
        return True

    def look(self) -> None:
        """See what has come, and what of it may begin."""
        self._see()
        held = self._store.quotas.held_back(self._ops.values(), time.time())
        self._shut |= held.shut
        for op_id in held.op_ids:
            op = self._ops[op_id]
            if op_id in held.for_long or op.tenant_id in self._shut:
                self._park(op)
        self._held = {op_id for op_id in held.op_ids if op_id in self._ops}
        self._offered = None

    def _park(self, op: OpRow) -> None:
        del self._ops[op.id]
        self._parked.add(op.tenant_id)
        if op.run_id is not None:
            self._parked_runs.add(op.run_id)

    def _see(self) -> None:
        if time.monotonic() - self._read_at > self._scan_interval_s:
            self._read()
            return
        look = self._store.waiting.since(self._me, self._base, self._newest, LOOK_AT_MOST, self._role)
        if look.has_early or look.is_cut:
            self._read()
            return
        self._newest = look.newest
        self._ops.update(
            (op.id, op) for op in look.ops if op.tenant_id not in self._shut and op.run_id not in self._parked_runs
        )

    def _read(self) -> None:
        look = self._store.waiting.all(self._me, self._base, LOOK_AT_MOST, self._role)
        for parked in (self._shut, self._parked, self._parked_runs):
            parked.clear()
        self._ops = {op.id: op for op in (self._uncrowded(look.ops) if look.is_cut else look.ops)}
        self._newest = look.newest
        self._read_at = float("-inf") if look.has_early or look.is_cut else time.monotonic()

    def _uncrowded(self, ops: Sequence[OpRow]) -> list[OpRow]:
        """Of a look that was cut: what quotas hold back, maybe until tomorrow, doesn't take the place of others."""
        held = self._store.quotas.held_back(ops, time.time()).op_ids
        crowding = {op.tenant_id for op in ops if op.id in held}
        if not crowding:
            return list(ops)
        others = self._store.waiting.all(self._me, self._base, LOOK_AT_MOST, self._role, crowding).ops
        return [*(op for op in ops if op.tenant_id in crowding and op.id not in held), *others]
