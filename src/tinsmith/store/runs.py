"""Training runs: their rows, their leases and the record of their snapshots.

Owns who holds a run. A lease is an owner and an epoch on the run's row; a worker that falls silent loses its runs to
the next one that looks. Ops belong to arrivals.py and outcomes.py; here they are only queued again when a run
changes hands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import Connection, and_, bindparam, func, literal_column, or_, select, update

from tinsmith.crashpoints import crash_point
from tinsmith.errors import FencedError, NotFoundError
from tinsmith.store.checksums import check_run, row_changed
from tinsmith.store.database import Database
from tinsmith.store.fences import IS_RUNNING, WANTS_WORKER, dispossess, require_current, require_leased
from tinsmith.store.gone import require_there
from tinsmith.store.prepared import Prepared, readable
from tinsmith.store.rows import RunRow, WorkerId
from tinsmith.store.run_rows import COLUMNS, to_run
from tinsmith.store.schema import ops, runs, sessions, workers
from tinsmith.store.snapshots import Cold, Recorded, Snapshot, cold_runs, prune_some, put_snapshot, put_spare
from tinsmith.types import BlobKey, Role, RunId, RunStatus, TenantId

RunRows: TypeAlias = list[RunRow]  # within the class, `list` is a method
RunIds: TypeAlias = list[RunId]
BlobKeys: TypeAlias = list[BlobKey]
ACTIVE_S = 60.0  # a run that was asked for something within that time is load
PATIENCE_S = 2.0  # a worker that has nothing to do looks sooner than that

_GET = Prepared(
    select(*COLUMNS).where(runs.c.run_id == bindparam("run_id"), runs.c.tenant_id == bindparam("tenant_id"))
)
_IS_LISTED = and_(
    runs.c.tenant_id == bindparam("tenant_id"),
    runs.c.status != RunStatus.GONE.value,
    or_(
        bindparam("project_id").is_(None),
        runs.c.session_id.in_(select(sessions.c.session_id).where(sessions.c.project_id == bindparam("project_id"))),
    ),
)
_LIST = (
    select(*COLUMNS)
    .where(_IS_LISTED)
    .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
    .limit(bindparam("limit"))
    .offset(bindparam("offset"))
)
_COUNT = select(func.count()).select_from(runs).where(_IS_LISTED)
_WANTING = Prepared(
    select(runs.c.run_id, runs.c.last_request_at)
    .where(runs.c.wants_worker.is_(True), runs.c.base_model == bindparam("base"))
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
_PEERS = Prepared(
    select(workers.c.slot).where(
        workers.c.base_model == bindparam("base"),
        workers.c.is_ready,
        workers.c.lease_until >= bindparam("now"),
        workers.c.slot != bindparam("slot"),
        workers.c.role != literal_column(f"'{Role.SAMPLE.value}'"),
    )
)
_NUM_ACTIVE = Prepared(
    select(func.count())
    .select_from(runs)
    .where(runs.c.lease_owner == bindparam("slot"), runs.c.last_request_at > bindparam("since"))
)
_SILENT = Prepared(
    select(workers.c.slot).where(
        workers.c.base_model == bindparam("base"),
        workers.c.lease_until > 0,
        workers.c.lease_until < bindparam("now"),
        workers.c.slot != bindparam("slot"),
    )
)
_RETIRE = (
    update(workers)
    .where(workers.c.slot == bindparam("of_slot"))
    .values(incarnation=workers.c.incarnation + 1, lease_until=0.0)
)
_REQUEUE = (
    update(ops)
    .where(ops.c.run_id.in_(bindparam("run_ids", expanding=True)), IS_RUNNING)
    .values(state="queued", started_at=None)
)
_TAKE = (
    update(runs)
    .where(runs.c.run_id.in_(bindparam("run_ids", expanding=True)))
    .values(lease_owner=bindparam("slot"), epoch=runs.c.epoch + 1, wants_worker=False)
    .returning(*COLUMNS)
)
_HELD = select(*COLUMNS).where(runs.c.lease_owner == bindparam("slot")).order_by(runs.c.run_id)
_HAND_BACK = (
    update(ops)
    .where(ops.c.run_id.in_(bindparam("run_ids", expanding=True)), IS_RUNNING, ops.c.owner == bindparam("slot"))
    .values(state="queued", started_at=None, attempts=ops.c.attempts - 1)
)
_RELEASE = (
    update(runs)
    .where(runs.c.run_id.in_(bindparam("run_ids", expanding=True)), runs.c.lease_owner == bindparam("slot"))
    .values(lease_owner=None, wants_worker=WANTS_WORKER)
)
_SET_STATUS = (
    update(runs)
    .where(runs.c.run_id == bindparam("of_run"), runs.c.status != RunStatus.GONE.value)
    .values(status=bindparam("new_status"))
)


class Runs:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, tenant_id: TenantId, run_id: RunId) -> RunRow:
        """Raises:
        NotFoundError: no such run of this tenant.
        GoneError: it was let go; the message says when and why.
        CorruptError: its row was changed on the disk.
        """
        with self._database.read() as conn:
            row = _GET.first(conn, {"run_id": run_id, "tenant_id": tenant_id})
            if row is None:
                raise NotFoundError(f"no training run {run_id}")
            run = to_run(row)
            if run.is_changed:
                raise row_changed(f"the run {run_id}")
            if run.status is RunStatus.GONE:
                require_there(conn, run_id)
        return run

    def get_held(self, worker: WorkerId, run_id: RunId) -> RunRow:
        """A run that this worker's slot holds, whatever became of it.

        Raises:
            FencedError: the worker doesn't hold it.
        """
        with self._database.read() as conn, readable(conn):
            row = conn.execute(
                _HELD.where(runs.c.run_id == bindparam("one")), {"slot": worker.slot, "one": run_id}
            ).first()
        if row is None:
            raise FencedError(f"worker {worker.slot} doesn't hold {run_id}")
        return to_run(row)

    def list(self, tenant_id: TenantId, limit: int, offset: int, project_id: str | None = None) -> tuple[RunRows, int]:
        """One page, newest first, and how many there are in all; of one project, if it is named."""
        values = {"tenant_id": tenant_id, "project_id": project_id}
        with self._database.read() as conn, readable(conn):
            total = conn.execute(_COUNT, values).scalar_one()
            rows = conn.execute(_LIST, {**values, "limit": limit, "offset": offset})
            return [to_run(row) for row in rows], total

    def lease(
        self,
        worker: WorkerId,
        base_model: str,
        limit: int,
        now: float | None = None,
        without: Collection[RunId] = (),
    ) -> RunRows:
        """Take runs of the base that have runnable queued ops and no living holder; the newly taken ones.

        Each gets the next epoch, and its running ops are queued again. A worker of the base that fell silent (its
        lease is over by `now`, default: the clock) loses its place here: all of its runs become free, its running
        ops are queued again, and whatever it still tries to write is fenced. Writes nothing if there's nothing to take.

        Where other workers of the base live, each leaves runs to those that hold fewer active ones; a run that nobody
        took for `PATIENCE_S` goes to whoever looks. `without`: runs that this worker leaves to others.

        Raises:
            FencedError: this worker's place was taken.
        """
        now = time.time() if now is None else now
        watch = {"base": base_model, "now": now, "slot": worker.slot}
        with self._database.read() as conn:
            silent = _SILENT.first(conn, watch)
            if silent is None and not _choose(conn, watch, limit=limit, without=without):
                return []
        with self._database.write(is_durable=False) as conn:
            require_current(conn, worker)
            for (slot,) in _SILENT.all(conn, watch):
                dispossess(conn, slot)
                conn.execute(_RETIRE, {"of_slot": slot})
            run_ids = _choose(conn, watch, limit=limit, without=without)
            if not run_ids:
                return []
            conn.execute(_REQUEUE, {"run_ids": run_ids})
            with readable(conn):
                rows = conn.execute(_TAKE, {"run_ids": run_ids, "slot": worker.slot}).all()
            crash_point("store.before_lease_commit")
        return sorted((to_run(row) for row in rows), key=lambda run: run.run_id)

    def release(self, worker: WorkerId, run_ids: Sequence[RunId]) -> None:
        """Give runs back; ops of them that this worker still has claimed are queued as if they had not been.

        Runs that it doesn't hold are left alone.

        Raises:
            FencedError: the worker's place was taken (and its runs with it).
        """
        if not run_ids:
            return
        with self._database.write(is_durable=False) as conn:
            require_current(conn, worker)
            values = {"run_ids": list(run_ids), "slot": worker.slot}
            conn.execute(_HAND_BACK, values)
            conn.execute(_RELEASE, values)
            crash_point("store.before_release_commit")

    def held(self, worker: WorkerId) -> RunRows:
        """The runs that this worker's slot holds."""
        with self._database.read() as conn, readable(conn):
            return [to_run(row) for row in conn.execute(_HELD, {"slot": worker.slot})]

    def check(self, run: RunRow) -> None:
        """Raises: CorruptError: what it was born with isn't what was stored, or its row holds what none can."""
        if run.is_changed:
            raise row_changed(f"the run {run.run_id}")
        with self._database.read() as conn, readable(conn):
            check_run(conn, run.run_id)

    def set_status(self, worker: WorkerId, run_id: RunId, status: RunStatus) -> None:
        """CORRUPTED for a run whose state can't be rebuilt, READY once it can.

        Raises:
            FencedError: the worker doesn't hold the run.
        """
        with self._database.write() as conn:
            require_current(conn, worker)
            require_leased(conn, worker, [run_id])
            conn.execute(_SET_STATUS, {"of_run": run_id, "new_status": status.value})

    def record_snapshot(
        self,
        worker: WorkerId,
        run_id: RunId,
        seq: int,
        blob: BlobKey,
        size: int,
        now: float,
        *,
        is_newest_damaged: bool = False,
    ) -> Recorded:
        """The run's state up to op `seq` is in `blob`, which is on disk: recovery starts there from now on.

        The snapshot that was the newest is kept as the one before, unless `is_newest_damaged`: then that one goes, and
        the one before it, from which the run was computed again, stays. CREATE and LOAD ops that no kept snapshot
        leaves to be replayed let go of the checkpoint that they read. A snapshot older than the recorded one is
        ignored, and its file goes to the graveyard.

        Returns:
            What this takes out of use, for the caller to delete.

        Raises:
            FencedError: the worker doesn't hold the run.
        """
        with self._database.write() as conn:
            require_current(conn, worker)
            require_leased(conn, worker, [run_id])
            recorded = put_snapshot(conn, run_id, Snapshot(seq, blob, size), now, is_newest_damaged=is_newest_damaged)
            crash_point("store.before_snapshot_commit")
        return recorded

    def cold(self, before: float, above: RunId, limit: int) -> Sequence[Cold]:
        """See `snapshots.cold_runs`."""
        with self._database.read() as conn:
            return cold_runs(conn, before, above, limit)

    def put_spare(self, cold: Cold, spare: BlobKey, now: float) -> bool:
        """See `snapshots.put_spare`."""
        with self._database.write() as conn:
            return put_spare(conn, cold, spare, now)

    def prune_payloads(self, run_id: RunId) -> BlobKeys:
        """Forget the payloads of final ops up to the snapshot before the newest, which aren't replayed any more.

        In small transactions, so that no other writer waits for long.

        Returns:
            The payload files, for the caller to delete.
        """
        blobs: BlobKeys = []
        is_all = False
        while not is_all:
            with self._database.write() as conn:
                pruned, is_all = prune_some(conn, run_id)
                crash_point("store.before_prune_commit")
            blobs += pruned
        return blobs


def _choose(conn: Connection, watch: Mapping[str, Any], *, limit: int, without: Collection[RunId]) -> RunIds:
    """Of the runs that want a worker those that this one should take."""
    rows = _WANTING.all(conn, {"base": watch["base"], "limit": limit + len(without)})
    wanting = [(run_id, asked_at) for run_id, asked_at in rows if run_id not in without]
    slots = [slot for (slot,) in _PEERS.all(conn, watch)] if wanting else []
    if not slots:
        return [run_id for run_id, _ in wanting]
    since = watch["now"] - ACTIVE_S
    mine, *others = (_NUM_ACTIVE.first(conn, {"slot": slot, "since": since})[0] for slot in (watch["slot"], *slots))
    share = math.ceil((mine + sum(others) + len(wanting)) / (1 + len(slots))) - mine
    left = [run_id for run_id, asked_at in wanting if asked_at < watch["now"] - PATIENCE_S]
    fresh = [run_id for run_id, asked_at in wanting if asked_at >= watch["now"] - PATIENCE_S]
    return left + fresh[: max(0, share - len(left))]
