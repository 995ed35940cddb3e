"""How much each worker of a base has on its hands, for who shares runs out among them. Reads alone."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, exists, func, literal_column, or_, select

from tinsmith.store.database import Database
from tinsmith.store.fences import HAS_RUNNABLE, IS_RUNNING
from tinsmith.store.prepared import Prepared
from tinsmith.store.runs import ACTIVE_S
from tinsmith.store.schema import ops, runs, workers
from tinsmith.types import Role

_IS_ITS = runs.c.lease_owner == workers.c.slot
_IS_ACTIVE = runs.c.last_request_at > bindparam("since")
_NUM_ACTIVE = select(func.count()).select_from(runs).where(_IS_ITS, _IS_ACTIVE).scalar_subquery()
_HAS_WORK = or_(
    exists().where(ops.c.owner == workers.c.slot, IS_RUNNING),
    exists().where(_IS_ITS, _IS_ACTIVE, HAS_RUNNABLE),
)
_OF_BASE = Prepared(
    select(workers.c.slot, _NUM_ACTIVE, _HAS_WORK)
    .where(
        workers.c.base_model == bindparam("base"),
        workers.c.is_ready,
        workers.c.lease_until >= bindparam("now"),
        workers.c.role != literal_column(f"'{Role.SAMPLE.value}'"),
    )
    .order_by(workers.c.slot)
)


@dataclass(frozen=True, slots=True)
class Burden:
    """num_active: runs that it holds and that were asked for something lately. is_idle: it has nothing to do."""

    slot: str
    num_active: int
    is_idle: bool


class Burdens:
    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, base_model: str, now: float) -> list[Burden]:
        """Of the workers that live, have loaded the base, and train."""
        with self._database.read() as conn:
            rows = _OF_BASE.all(conn, {"base": base_model, "now": now, "since": now - ACTIVE_S})
        return [Burden(slot, num_active, not has_work) for slot, num_active, has_work in rows]
