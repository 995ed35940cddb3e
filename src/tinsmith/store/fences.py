"""Who may write: the worker whose incarnation is the newest of its slot, for the runs that it has leased.

Also what taking a worker's place does: its runs become free and its running ops are queued again. Works within the
caller's transaction; every store module that a worker writes through asks here first.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, bindparam, exists, func, literal_column, or_, select, update

from tinsmith.errors import FencedError
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import WorkerId
from tinsmith.store.schema import ops, replays, runs, samplers, workers
from tinsmith.types import RunId

MAX_EXCUSED = 16  # of an op: who kills from outside again and again may be a guard of memory, and the op the reason

# Literals, not parameters: a partial index is used only where its condition is in the text of the statement.
IS_QUEUED: ColumnElement[bool] = ops.c.state == literal_column("'queued'")
IS_RUNNING: ColumnElement[bool] = ops.c.state == literal_column("'running'")
IS_PROMISED: ColumnElement[bool] = samplers.c.promised_seq.is_not(None)
HAS_RUNNABLE = exists().where(ops.c.run_id == runs.c.run_id, IS_QUEUED, ops.c.seq_id <= runs.c.head_seq).correlate(runs)
HAS_PROMISED = exists().where(samplers.c.run_id == runs.c.run_id, IS_PROMISED).correlate(runs)
WANTS_WORKER = or_(HAS_RUNNABLE, HAS_PROMISED)

_INCARNATION = Prepared(select(workers.c.incarnation).where(workers.c.slot == bindparam("slot")).with_for_update())
_OWNER = Prepared(select(runs.c.lease_owner).where(runs.c.run_id == bindparam("run_id")))
_REQUEUE = update(ops).where(ops.c.owner == bindparam("slot"), IS_RUNNING).values(state="queued", started_at=None)
_EXCUSE = update(ops).where(ops.c.owner == bindparam("slot"), IS_RUNNING).values(excused=ops.c.excused + 1)
_OF_ITS_RUNS = (
    select(ops.c.op_id).join(runs, runs.c.run_id == ops.c.run_id).where(runs.c.lease_owner == bindparam("slot"))
)
_EXCUSE_REPLAYS = update(replays).where(replays.c.op_id.in_(_OF_ITS_RUNS)).values(excused=replays.c.excused + 1)
_UNTRY = update(ops).where(ops.c.owner == bindparam("slot"), IS_RUNNING).values(attempts=ops.c.attempts - 1)
_UNTRY_REPLAYS = (
    update(replays)
    .where(replays.c.op_id.in_(_OF_ITS_RUNS), replays.c.num_begun > 0)
    .values(num_begun=replays.c.num_begun - 1)
)
_FREE = update(runs).where(runs.c.lease_owner == bindparam("slot")).values(lease_owner=None, wants_worker=WANTS_WORKER)


def require_current(conn: Connection, worker: WorkerId) -> None:
    """Raises: FencedError: another process has taken this worker's slot, or its place was given up."""
    row = _INCARNATION.first(conn, {"slot": worker.slot})
    incarnation = None if row is None else row[0]
    if incarnation != worker.incarnation:
        raise FencedError(
            f"worker {worker.slot} is incarnation {incarnation} now, not {worker.incarnation}: it was replaced"
        )


def require_leased(conn: Connection, worker: WorkerId, run_ids: Collection[RunId]) -> None:
    """Raises: FencedError: the worker doesn't hold all of these runs."""
    owners = {run_id: _OWNER.first(conn, {"run_id": run_id}) for run_id in run_ids}
    lost = {run_id for run_id, owner in owners.items() if owner is None or owner[0] != worker.slot}
    if lost:
        raise FencedError(f"worker {worker.slot} doesn't hold {', '.join(sorted(lost))}")


def blame(num_deaths: ColumnElement[int], excused: ColumnElement[int]) -> ColumnElement[int]:
    """Of the deaths of workers under an op those that it may have caused; not all can be excused."""
    return num_deaths - func.min(excused, literal_column(str(MAX_EXCUSED)))


def dispossess(conn: Connection, slot: str, *, is_excused: bool = False, is_untried: bool = False) -> None:
    """Free the slot's runs and queue its running ops again; what they had of `attempts` stays.

    is_excused: what its worker was at has not ended it, as far as can be told. is_untried: it has not, for sure.
    """
    if is_untried:
        conn.execute(_UNTRY, {"slot": slot})
        conn.execute(_UNTRY_REPLAYS, {"slot": slot})
    if is_excused:
        conn.execute(_EXCUSE, {"slot": slot})
        conn.execute(_EXCUSE_REPLAYS, {"slot": slot})
    conn.execute(_REQUEUE, {"slot": slot})
    conn.execute(_FREE, {"slot": slot})
