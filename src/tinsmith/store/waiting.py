"""What of the queue a worker may run: all of it, or what came since it last looked.

Reads alone. A worker that looks hundreds of times a second keeps what it has seen and asks for what is newer; `Look`
says when that isn't enough. What stays true: rows get their number in the order in which they are committed (SQLite has
one writer), so nothing at or below `newest` shows up later. A row may become runnable later, though: one that arrived
before its predecessors (`has_early`), one whose run gets another holder, one that is queued again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, Connection, Integer, Select, bindparam, exists, func, literal_column, or_, select

from tinsmith.store.database import Database
from tinsmith.store.fences import IS_QUEUED
from tinsmith.store.op_rows import LIGHT, is_known, to_op
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import OpRow, WorkerId
from tinsmith.store.schema import ops, runs
from tinsmith.types import OpKind, Role, TenantId

_MOST = bindparam("most", type_=Integer)
_IS_KNOWN = ops.c.kind.in_([literal_column(f"'{kind}'") for kind in OpKind])  # for the queue's index
# A run is looked up for each queued op, and not the ops of each run: a worker may hold thousands that are idle.
_OF_HELD_RUN = exists().where(runs.c.run_id == ops.c.run_id, runs.c.lease_owner == bindparam("slot")).correlate(ops)
_NOT_OF = ops.c.tenant_id.not_in(select(func.json_each(bindparam("without", type_=JSON)).table_valued("value").c.value))
_RUNNABLE_IN_RUNS = select(*LIGHT).where(
    IS_QUEUED, ops.c.run_id.is_not(None), _OF_HELD_RUN.where(ops.c.seq_id <= runs.c.head_seq), _NOT_OF
)
_EARLY = Prepared(
    select(ops.c.op_id)
    .where(IS_QUEUED, ops.c.run_id.is_not(None), _OF_HELD_RUN.where(ops.c.seq_id > runs.c.head_seq))
    .limit(1)
)
_WAITING_SAMPLES = select(*LIGHT).where(
    ops.c.base_model == bindparam("base"), ops.c.kind == "sample", IS_QUEUED, _NOT_OF
)
_NEWER = Prepared(
    select(*LIGHT, runs.c.head_seq)
    .outerjoin(runs, runs.c.run_id == ops.c.run_id)
    .where(
        ops.c.base_model == bindparam("base"),
        _IS_KNOWN,
        ops.c.num > bindparam("above"),
        IS_QUEUED,
        or_(ops.c.run_id.is_(None), runs.c.lease_owner == bindparam("slot")),
    )
    .order_by(ops.c.num)
    .limit(_MOST)
)
_NEWEST = Prepared(select(func.max(ops.c.num)))


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    newest: the number of the newest op of all. has_early: ops wait for predecessors that have not arrived.
    is_cut: there is more than was asked for.
    """

    ops: list[OpRow]
    newest: int
    has_early: bool = False
    is_cut: bool = False


class Waiting:
    def __init__(self, database: Database) -> None:
        self._database = database

    def all(
        self,
        worker: WorkerId,
        base_model: str,
        limit: int,
        role: Role = Role.ALL,
        without: Collection[TenantId] = (),
    ) -> Look:
        """QUEUED ops without their payloads: of the worker's runs up to each run's head, ordered by (run, seq); then
        waiting samples of the base, oldest first. At most `limit` of either.

        Where there are more, every tenant has its first ones among them: of each of its runs those that are next, of
        each of its samplers the oldest. Of what the worker's role excludes, and of the tenants in `without`, there are
        none.
        """
        of_others = {"without": list(without)}
        in_runs, in_base = {"slot": worker.slot, **of_others}, {"base": base_model, **of_others}
        with self._database.read() as conn:
            newest = _newest(conn)
            of_runs, is_cut = _OF_RUNS.first_ones(conn, in_runs, limit) if role.trains else ([], False)
            samples, are_cut = _SAMPLES.first_ones(conn, in_base, limit) if role.samples else ([], False)
            has_early = role.trains and _EARLY.first(conn, {"slot": worker.slot}) is not None
        return Look(of_runs + samples, newest, has_early, is_cut or are_cut)

    def since(self, worker: WorkerId, base_model: str, above: int, limit: int, role: Role = Role.ALL) -> Look:
        """The same of those that arrived after number `above`, in the order of their arrival."""
        with self._database.read() as conn:
            newest = _newest(conn)
            values = {"base": base_model, "slot": worker.slot, "above": above, "most": limit}
            rows = _NEWER.all(conn, values) if newest > above else []
        found = [(op, row[-1]) for row in rows if _is_for(role, op := to_op(row[:-1])) and is_known(op)]
        ready = [op for op, head in found if op.run_id is None or op.seq_id <= head]
        return Look(ready, newest, len(ready) < len(found), len(rows) == limit)


class _Fair:
    """A query in an order; where that is cut by the limit, the first rows of every tenant instead, and of a tenant's
    the first of each line (a run, a sampler), still in order."""

    def __init__(self, query: Select[Any], order: tuple[Any, ...], line: Any) -> None:
        self._all = Prepared(query.order_by(*order).limit(_MOST))
        turn = func.row_number().over(partition_by=line, order_by=order)
        labelled = (c.label(f"order_{i}") for i, c in enumerate(order))
        in_lines = query.add_columns(*labelled, ops.c.tenant_id.label("of_tenant"), turn.label("turn")).subquery()
        keys = [in_lines.c[f"order_{i}"] for i in range(len(order))]
        place = func.row_number().over(partition_by=in_lines.c.of_tenant, order_by=(in_lines.c.turn, *keys))
        ranked = select(in_lines, place.label("place")).subquery()
        keys = [ranked.c[f"order_{i}"] for i in range(len(order))]
        chosen = select(ranked).order_by(ranked.c.place, *keys).limit(_MOST).subquery()
        in_order = (chosen.c[f"order_{i}"] for i in range(len(order)))
        self._shared = Prepared(select(*list(chosen.c)[: len(LIGHT)]).order_by(*in_order))

    def first_ones(self, conn: Connection, values: dict[str, Any], limit: int) -> tuple[list[OpRow], bool]:
        """(at most `limit` rows, whether there are more)."""
        rows = self._all.all(conn, {**values, "most": limit + 1})
        is_cut = len(rows) > limit
        if is_cut:
            rows = self._shared.all(conn, {**values, "most": limit})
        return [op for op in map(to_op, rows) if is_known(op)], is_cut


_OF_RUNS = _Fair(_RUNNABLE_IN_RUNS, (ops.c.run_id, ops.c.seq_id), ops.c.run_id)
_SAMPLES = _Fair(_WAITING_SAMPLES, (ops.c.num,), ops.c.sampler_id)


def _is_for(role: Role, op: OpRow) -> bool:
    return role.samples if op.kind is OpKind.SAMPLE else role.trains


def _newest(conn: Connection) -> int:
    (newest,) = _NEWEST.first(conn, {})
    return int(newest or 0)
