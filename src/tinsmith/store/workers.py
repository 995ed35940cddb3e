"""Workers: one row a slot, which the newest process to register there holds.

Owns incarnations and lease times. A slot's next process fences the one before it, even one that is alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, insert, select, update

from tinsmith.errors import FencedError
from tinsmith.store.database import Database
from tinsmith.store.fences import dispossess
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import WorkerId, WorkerRow
from tinsmith.store.schema import workers
from tinsmith.types import Role

_COLUMNS = (
    workers.c.slot, workers.c.incarnation, workers.c.base_model, workers.c.registered_at,
    workers.c.lease_until, workers.c.is_ready, workers.c.role, workers.c.busy_s, workers.c.measured_at,
)  # fmt: skip
_LIST = select(*_COLUMNS).order_by(workers.c.slot)
_INCARNATION = select(workers.c.incarnation).where(workers.c.slot == bindparam("slot")).with_for_update()
_INSERT = insert(workers).inline()
_REPLACE = (
    update(workers)
    .where(workers.c.slot == bindparam("of_slot"))
    .values(
        incarnation=bindparam("new_incarnation"), base_model=bindparam("base"), registered_at=bindparam("now"),
        lease_until=bindparam("until"), is_ready=False, role=bindparam("new_role"), busy_s=0.0, measured_at=None,
    )
)  # fmt: skip
_IS_ME = (workers.c.slot == bindparam("of_slot")) & (workers.c.incarnation == bindparam("mine"))
_RENEW = (
    update(workers)
    .where(_IS_ME)
    .values(lease_until=bindparam("until"), busy_s=bindparam("busy"), measured_at=bindparam("now"))
)
_SET_READY = update(workers).where(_IS_ME).values(is_ready=True)
_READY = Prepared(
    select(workers.c.base_model, workers.c.role).where(workers.c.is_ready, workers.c.lease_until > bindparam("now"))
)
_LEAVE = update(workers).where(_IS_ME).values(incarnation=workers.c.incarnation + 1, lease_until=0.0, is_ready=False)

_VACATE = (
    update(workers)
    .where(workers.c.slot == bindparam("of_slot"))
    .values(incarnation=workers.c.incarnation + 1, lease_until=0.0, is_ready=False)
)


class Workers:
    def __init__(self, database: Database) -> None:
        self._database = database

    def register(self, slot: str, base_model: str, lease_s: float, now: float, role: Role = Role.ALL) -> WorkerId:
        """Take the slot: its next incarnation. Runs that the slot held become free and its running ops are queued."""
        with self._database.write() as conn:
            last = conn.execute(_INCARNATION, {"slot": slot}).scalar()
            worker = WorkerId(slot, 1 if last is None else last + 1)
            if last is None:
                conn.execute(
                    _INSERT,
                    {
                        "slot": slot,
                        "incarnation": worker.incarnation,
                        "base_model": base_model,
                        "registered_at": now,
                        "lease_until": now + lease_s,
                        "is_ready": False,
                        "role": role.value,
                    },
                )
                return worker
            dispossess(conn, slot)
            conn.execute(
                _REPLACE,
                {
                    "of_slot": slot,
                    "new_incarnation": worker.incarnation,
                    "base": base_model,
                    "now": now,
                    "until": now + lease_s,
                    "new_role": role.value,
                },
            )
        return worker

    def renew(self, worker: WorkerId, lease_s: float, now: float, busy_s: float = 0.0) -> None:
        """Keep the runs until `now + lease_s`. A lease that is over can be renewed until somebody took the runs.

        `busy_s` is how long the worker has computed since it was registered.

        Raises:
            FencedError: the worker's place was taken.
        """
        with self._database.write(is_durable=False) as conn:
            until = now + lease_s
            values = {"of_slot": worker.slot, "mine": worker.incarnation, "until": until, "now": now, "busy": busy_s}
            if not conn.execute(_RENEW, values).rowcount:
                raise FencedError(f"worker {worker.slot} is no longer incarnation {worker.incarnation}")

    def set_ready(self, worker: WorkerId) -> None:
        """Its base model is loaded; so it stays until the slot is taken anew or given back.

        Raises:
            FencedError: the worker's place was taken.
        """
        with self._database.write() as conn:
            if not conn.execute(_SET_READY, {"of_slot": worker.slot, "mine": worker.incarnation}).rowcount:
                raise FencedError(f"worker {worker.slot} is no longer incarnation {worker.incarnation}")

    def ready_bases(self, now: float) -> set[str]:
        """The base models that living workers have loaded, so that both training and sampling are done."""
        with self._database.read() as conn:
            loaded = [(base, Role(role)) for base, role in _READY.all(conn, {"now": now})]
        return {base for base, role in loaded if role.trains} & {base for base, role in loaded if role.samples}

    def deregister(self, worker: WorkerId, *, is_untried: bool = False) -> None:
        """Give everything back at once; nothing happens if the worker's place was taken. is_untried: what it is at
        counts as never begun."""
        with self._database.write() as conn:
            if conn.execute(_LEAVE, {"of_slot": worker.slot, "mine": worker.incarnation}).rowcount:
                dispossess(conn, worker.slot, is_untried=is_untried)

    def vacate(self, slot: str, *, is_excused: bool = False) -> None:
        """The slot's process is known to be dead: nothing is ready there, its runs are free, what it ran is queued.

        is_excused: it was killed from outside, so what it ran is not suspected for that.
        """
        with self._database.write() as conn:
            if conn.execute(_VACATE, {"of_slot": slot}).rowcount:
                dispossess(conn, slot, is_excused=is_excused)

    def list(self) -> list[WorkerRow]:
        """All slots, those that were given up too (their `lease_until` is 0)."""
        with self._database.read() as conn:
            return [_to_worker(row) for row in conn.execute(_LIST)]


def _to_worker(row: Sequence[Any]) -> WorkerRow:
    slot, incarnation, base_model, registered_at, lease_until, is_ready, role, busy_s, measured_at = row
    return WorkerRow(
        slot, incarnation, base_model, registered_at, lease_until, is_ready, Role(role), busy_s, measured_at
    )
