"""What whoever checks or copies a whole data directory needs: every file that a row names, and rows at odds.

Reads all tenants; nothing here is reachable through the API. Each call is one consistent view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    exists,
    func,
    null,
    or_,
    select,
    text,
    update,
)

from tinsmith.errors import CorruptError
from tinsmith.store.checksums import CHANGED, ROW_CHANGED, Checked, check_payloads, check_results, check_rows
from tinsmith.store.database import Database, copy_database
from tinsmith.store.mends import odds
from tinsmith.store.prepared import driver_of, readable
from tinsmith.store.row_checks import CHECKS, PATH, schema_faults, unreadable_texts
from tinsmith.store.schema import checkpoints, custom_losses, dead_blobs, ops, runs, samplers, sessions
from tinsmith.types import BlobKey, CheckpointKind, OpId, OpKind, OpState, RunStatus, TenantId

MOST_FAULTS = 1000  # of one kind
_OPEN = (OpState.QUEUED.value, OpState.RUNNING.value)
_REPLAYED = tuple(kind.value for kind in OpKind if kind.has_effect)


class Naming(StrEnum):
    """What a file is to the row that names it."""

    PAYLOAD = "payload"
    RESULT = "result"
    ROUTES = "routes"
    PIN = "pinned"  # what a CREATE, a LOAD or a custom loss reads, until a snapshot covers it
    SNAPSHOT = "snapshot"
    PREVIOUS = "previous snapshot"  # from which a run is computed again if its newest is damaged
    SAMPLER = "sampler"
    LOSS = "loss"
    CHECKPOINT = "checkpoint"

    @property
    def is_private(self) -> bool:
        """Its key begins with the tenant of the row: it can't be shared."""
        return self in (Naming.PAYLOAD, Naming.RESULT, Naming.SNAPSHOT, Naming.PREVIOUS, Naming.LOSS)


@dataclass(frozen=True, slots=True)
class Reference:
    """owner: what names the file: a request, run, sampler, loss, or a checkpoint's tinker path.

    size in bytes, where the row says it. is_state: a file of run state (`checkpoint_file`).
    """

    naming: Naming
    tenant_id: TenantId
    owner: str
    blob: BlobKey
    size: int | None
    is_state: bool


@dataclass(frozen=True, slots=True)
class RowFault:
    """owner: the row; problem: what of it is at odds with others. is_mendable: `Mends.mend` makes it right.

    is_of_schema: what other rows say can't be read without it.
    """

    owner: str
    problem: str
    is_mendable: bool = False
    is_of_schema: bool = False


@dataclass(frozen=True, slots=True)
class CopiedRows:
    """named: every file that the copy names. faults: what is wrong with its rows, at most `MOST_FAULTS` of a kind."""

    named: set[BlobKey]
    faults: list[RowFault]


@dataclass(frozen=True, slots=True)
class Spare:
    """The snapshot before a run's newest; without a file its log is whole."""

    blob: BlobKey | None


class Upkeep:
    def __init__(self, database: Database) -> None:
        self._database = database

    def references(self) -> list[Reference]:
        """Every file that has to be there, once for each row that names it."""
        with self._database.read() as conn, readable(conn):
            return list(_references(conn))

    def copy(self, target: Path, hold: Callable[[set[BlobKey]], None], now: float) -> CopiedRows:
        """Copy the database, as it is at one moment, into the file `target`, damaged or not, and check that moment.

        Args:
            hold: called with every file that the copy names, while nobody can write: none of them is deleted before it
                returns. It has to be quick.
            now: unix seconds.
        """
        is_copied = False
        try:
            with self._database.read() as conn, readable(conn):
                with self._database.write():
                    named = {reference.blob for reference in _references(conn)}
                    hold(named)
                copy_database(driver_of(conn), target)
                is_copied = True
                faults = _troubles(conn, now)
        except CorruptError as error:
            if not is_copied:
                raise
            faults = [RowFault("database", error.message)]
        return CopiedRows(named, faults)

    def inline(self) -> dict[Naming, Checked]:
        """Payloads and results that stand in rows themselves, all of them read."""
        with self._database.read() as conn, readable(conn):
            return _inline(conn)

    def buried(self) -> set[BlobKey]:
        """Files that no row names any more, and whose deletion is due."""
        with self._database.read() as conn:
            return set(conn.execute(select(dead_blobs.c.blob)).scalars())

    def rows(self) -> Checked:
        """What requests and runs were born with, all of it read."""
        with self._database.read() as conn, readable(conn):
            return check_rows(conn)

    def faults(self, now: float) -> list[RowFault]:
        """What SQLite's own check finds, what the schema lacks, and rows that contradict one another or can't be.

        At most `MOST_FAULTS` of each kind. now: unix seconds.
        """
        with self._database.read() as conn, readable(conn):
            return _faults(conn, now)

    def troubles(self, now: float) -> list[RowFault]:
        """The `faults`, and payloads and results in rows that were changed."""
        with self._database.read() as conn, readable(conn):
            return _troubles(conn, now)

    def spare(self, run_id: str) -> Spare | None:
        """From what the run can be computed again without its newest snapshot; None: from nothing."""
        with self._database.read() as conn:
            row = conn.execute(_SPARE, {"of_run": run_id}).first()
        return None if row is None else Spare(row.previous_blob)

    def newest(self, run_id: str) -> BlobKey | None:
        """The file of its newest snapshot."""
        with self._database.read() as conn:
            return conn.execute(select(runs.c.snapshot_blob).where(runs.c.run_id == run_id)).scalar()

    def damaged_snapshots(self) -> list[tuple[str, float]]:
        """Runs of which a damaged snapshot was replaced, and when (unix seconds) that was last; newest first."""
        with self._database.read() as conn:
            return [(row.run_id, row.damaged_at) for row in conn.execute(_WERE_DAMAGED.limit(MOST_FAULTS))]

    def go_back(self, run_id: str, now: float) -> None:
        """The run's snapshot before the newest becomes its newest. Nobody else may use the database.

        Its log begins above it then, as a run does that was never snapshotted since.
        """
        with self._database.write() as conn:
            conn.execute(_GO_BACK, {"of_run": run_id, "now": now})

    def forget_previous(self, run_id: str) -> None:
        """The run has its newest snapshot alone from now on."""
        with self._database.write() as conn:
            conn.execute(_FORGET_PREVIOUS, {"of_run": run_id})

    def give_up_routes(self, op_id: OpId) -> None:
        """Their file is lost: what names the request as its provenance has its experts chosen anew from now on."""
        with self._database.write() as conn:
            conn.execute(_GIVE_UP_ROUTES, {"lost_op_id": op_id})

    def give_up_result(self, op_id: OpId) -> None:
        """It is lost: the request answers GoneError from now on."""
        with self._database.write() as conn:
            conn.execute(_GIVE_UP, {"lost_op_id": op_id})


def _inline(conn: Connection) -> dict[Naming, Checked]:
    return {Naming.PAYLOAD: check_payloads(conn), Naming.RESULT: check_results(conn)}


def _faults(conn: Connection, now: float) -> list[RowFault]:
    found = [
        RowFault("database", str(row[0]))
        for row in conn.execute(text(f"PRAGMA integrity_check({MOST_FAULTS})"))
        if row[0] != "ok"
    ]
    found += [
        RowFault(f"{row[0]}, row {row[1]}", f"names a row of {row[2]} that is not there")
        for row in conn.execute(text("PRAGMA foreign_key_check")).fetchmany(MOST_FAULTS)
    ]
    lacking = [RowFault(table, problem, is_of_schema=True) for table, problem in schema_faults(conn)]
    if lacking:
        return found + lacking
    found += [RowFault(*odd) for odd in unreadable_texts(conn, MOST_FAULTS)]
    found += [RowFault(odd.owner, odd.problem, is_mendable=True) for odd in odds(conn, now, MOST_FAULTS)]
    for query, problem in (*_FAULTS, *CHECKS):
        found += [RowFault(row[0], problem) for row in conn.execute(query.limit(MOST_FAULTS))]
    return found


def _troubles(conn: Connection, now: float) -> list[RowFault]:
    found = _faults(conn, now)
    if any(fault.is_of_schema for fault in found):
        return found
    changed = ((naming, op_id) for naming, checked in _inline(conn).items() for op_id in checked.damaged)
    found += [RowFault(f"{naming} of {op_id}", CHANGED) for naming, op_id in changed]
    return found + [RowFault(op_id, ROW_CHANGED) for op_id in check_rows(conn).damaged]


def _references(conn: Connection) -> Iterator[Reference]:
    for query, naming, is_state in _NAMED:
        for tenant_id, owner, blob, size in conn.execute(query):
            yield Reference(naming, tenant_id, str(owner), BlobKey(str(blob)), size, is_state)


def _named(
    tenant: ColumnElement[Any],
    owner: ColumnElement[Any],
    blob: ColumnElement[Any],
    size: ColumnElement[Any] | None = None,
) -> Select[Any]:
    return select(tenant, owner, blob, null() if size is None else size).where(blob.is_not(None))


_CHECKPOINT = _named(checkpoints.c.tenant_id, PATH, checkpoints.c.blob, checkpoints.c.size_bytes)
_EXTERNAL = checkpoints.c.kind == CheckpointKind.EXTERNAL.value
_NAMED: tuple[tuple[Select[Any], Naming, bool], ...] = (
    (_named(ops.c.tenant_id, ops.c.op_id, ops.c.payload_blob, ops.c.payload_bytes), Naming.PAYLOAD, False),
    (_named(ops.c.tenant_id, ops.c.op_id, ops.c.result_blob, ops.c.result_bytes), Naming.RESULT, False),
    (_named(ops.c.tenant_id, ops.c.op_id, ops.c.routes_blob, ops.c.routes_bytes), Naming.ROUTES, False),
    (_named(ops.c.tenant_id, ops.c.op_id, ops.c.pin_blob), Naming.PIN, False),
    (_named(runs.c.tenant_id, runs.c.run_id, runs.c.snapshot_blob, runs.c.snapshot_bytes), Naming.SNAPSHOT, True),
    (_named(runs.c.tenant_id, runs.c.run_id, runs.c.previous_blob, runs.c.previous_bytes), Naming.PREVIOUS, True),
    (
        _named(samplers.c.tenant_id, samplers.c.sampler_id, samplers.c.blob).where(samplers.c.promised_seq.is_(None)),
        Naming.SAMPLER,
        True,
    ),
    (_named(custom_losses.c.tenant_id, custom_losses.c.loss_id, custom_losses.c.blob), Naming.LOSS, False),
    (_CHECKPOINT.where(~_EXTERNAL), Naming.CHECKPOINT, True),
    (_CHECKPOINT.where(_EXTERNAL), Naming.CHECKPOINT, False),
)

_IS_NEEDED = or_(
    ops.c.state.in_(_OPEN),
    and_(ops.c.state == OpState.DONE.value, ops.c.kind.in_(_REPLAYED), ops.c.seq_id > runs.c.pruned_seq),
)
_OP_AND_RUN = select(ops.c.op_id).outerjoin(runs, runs.c.run_id == ops.c.run_id)
_FAULTS: tuple[tuple[Select[Any], str], ...] = (
    (
        _OP_AND_RUN.where(_IS_NEEDED, ops.c.payload_bytes > 0, ops.c.payload.is_(None), ops.c.payload_blob.is_(None)),
        "its payload is gone, and it has to be carried out, or again when its run is recovered",
    ),
    (
        select(ops.c.op_id).where(ops.c.payload.is_not(None), func.length(ops.c.payload) != ops.c.payload_bytes),
        "its payload has another size than it says",
    ),
    (
        select(ops.c.op_id).where(
            ops.c.state == OpState.DONE.value,
            ~ops.c.is_expired,
            ops.c.result_bytes > 0,
            ops.c.result.is_(None),
            ops.c.result_blob.is_(None),
        ),
        "it is done, and its result is gone before its time",
    ),
    (
        select(ops.c.op_id).where(ops.c.result.is_not(None), func.length(ops.c.result) != ops.c.result_bytes),
        "its result has another size than it says",
    ),
    (_OP_AND_RUN.where(ops.c.tenant_id != runs.c.tenant_id), "it is of another tenant than its run"),
    (
        select(runs.c.run_id)
        .join(sessions, sessions.c.session_id == runs.c.session_id)
        .where(runs.c.tenant_id != sessions.c.tenant_id),
        "it is of another tenant than its session",
    ),
    (
        select(samplers.c.sampler_id)
        .join(sessions, sessions.c.session_id == samplers.c.session_id)
        .where(samplers.c.tenant_id != sessions.c.tenant_id),
        "it is of another tenant than its session",
    ),
    (
        select(PATH)
        .join(runs, runs.c.run_id == checkpoints.c.run_id)
        .where(runs.c.tenant_id != checkpoints.c.tenant_id),
        "it is of another tenant than its run",
    ),
    (
        select(runs.c.run_id).where(
            runs.c.gone_at.is_(None),
            or_(
                runs.c.head_seq > runs.c.max_seq,
                runs.c.snapshot_seq > runs.c.head_seq,
                runs.c.pruned_seq > runs.c.snapshot_seq,
                runs.c.previous_seq > runs.c.snapshot_seq,
                and_(runs.c.previous_seq >= 0, runs.c.previous_blob.is_(None)),
                and_(runs.c.snapshot_seq >= 0, runs.c.snapshot_blob.is_(None)),
            ),
        ),
        "its snapshot, its log and what was forgotten of it don't fit together",
    ),
    (
        select(runs.c.run_id).where(
            or_(
                (runs.c.status == RunStatus.GONE.value) != runs.c.gone_at.is_not(None),
                and_(
                    runs.c.gone_at.is_not(None),
                    or_(
                        exists().where(checkpoints.c.run_id == runs.c.run_id).correlate(runs),
                        exists().where(ops.c.run_id == runs.c.run_id, ops.c.state.in_(_OPEN)).correlate(runs),
                    ),
                ),
                and_(
                    runs.c.cleared_at.is_not(None),
                    or_(
                        runs.c.snapshot_blob.is_not(None),
                        runs.c.previous_blob.is_not(None),
                        exists().where(ops.c.run_id == runs.c.run_id).correlate(runs),
                    ),
                ),
            )
        ),
        "it was let go, and something of it is left that should not be",
    ),
)
_SPARE = select(runs.c.previous_blob).where(
    runs.c.run_id == bindparam("of_run"),
    or_(runs.c.previous_blob.is_not(None), runs.c.previous_seq < 0),
    runs.c.previous_blob.is_distinct_from(runs.c.snapshot_blob),
    runs.c.pruned_seq <= runs.c.previous_seq,
    runs.c.previous_seq <= runs.c.snapshot_seq,
)
_WERE_DAMAGED = (
    select(runs.c.run_id, runs.c.damaged_at)
    .where(runs.c.damaged_at.is_not(None))
    .order_by(runs.c.damaged_at.desc(), runs.c.run_id)
)
_NO_PREVIOUS = {"previous_seq": -1, "previous_blob": None, "previous_bytes": 0}
_GO_BACK = (
    update(runs)
    .where(runs.c.run_id == bindparam("of_run"))
    .values(
        snapshot_seq=runs.c.previous_seq,
        snapshot_blob=runs.c.previous_blob,
        snapshot_bytes=runs.c.previous_bytes,
        damaged_at=bindparam("now"),
        **_NO_PREVIOUS,
    )
)
_FORGET_PREVIOUS = update(runs).where(runs.c.run_id == bindparam("of_run")).values(**_NO_PREVIOUS)
_GIVE_UP_ROUTES = update(ops).where(ops.c.op_id == bindparam("lost_op_id")).values(routes_blob=None, routes_bytes=None)
_GIVE_UP = (
    update(ops).where(ops.c.op_id == bindparam("lost_op_id")).values(is_expired=True, result=None, result_blob=None)
)
