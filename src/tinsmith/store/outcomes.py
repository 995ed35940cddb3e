"""How an op becomes final, with everything that commits beside it.

Works within the caller's transaction: the fence, the op's outcome, its run's status, its checkpoint and sampler rows,
its usage, and the burial of a payload that nobody will read again. An op that is final already keeps its outcome, and
nothing of the new one is recorded, except what it cost if it was cancelled. A checkpoint that may not take another's
name fails its op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, select, update

from tinsmith.errors import FencedError, NotFoundError, UserError
from tinsmith.scopes import Scope
from tinsmith.store.audit import note
from tinsmith.store.checkpoints import is_taken, put_checkpoint
from tinsmith.store.checksums import crc_of
from tinsmith.store.endings import meter_cancelled, number_ends
from tinsmith.store.fences import require_current, require_leased
from tinsmith.store.graveyard import bury
from tinsmith.store.ledger import meter
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import Finished, NewCheckpoint, Principal, WorkerId
from tinsmith.store.samplers import put_sampler
from tinsmith.store.schema import ops, runs
from tinsmith.store.usage_rows import Usage
from tinsmith.types import BlobKey, Failure, OpId, OpKind, OpState, RunId, RunStatus, SamplerId, TenantId
from tinsmith.wire.media import JSON

_OPEN = Prepared(
    select(
        ops.c.op_id, ops.c.tenant_id, ops.c.run_id, ops.c.sampler_id, ops.c.kind, ops.c.state, ops.c.owner,
        ops.c.payload_blob, ops.c.meta, ops.c.key_id,
    )
    .where(ops.c.op_id == bindparam("id"))
    .with_for_update()
)  # fmt: skip
_OUTCOME: dict[str, Any] = {
    "state": bindparam("new_state"),
    "finished_at": bindparam("now"),
    "result": bindparam("new_result"),
    "result_crc": bindparam("new_result_crc"),
    "result_blob": bindparam("new_result_blob"),
    "result_bytes": bindparam("new_result_bytes"),
    "routes_blob": bindparam("new_routes_blob"),
    "routes_bytes": bindparam("new_routes_bytes"),
    "result_media": bindparam("new_result_media"),
    "failure_code": bindparam("code"),
    "failure_category": bindparam("category"),
    "failure_message": bindparam("message"),
}
_UPDATE = update(ops).where(ops.c.op_id == bindparam("id")).values(**_OUTCOME)
_FINISH = Prepared(_UPDATE)
_FINISH_AND_FORGET = Prepared(_UPDATE.values(payload=None, payload_blob=None, pin_blob=None))
_SET_STATUS = update(runs).where(runs.c.run_id == bindparam("id")).values(status=bindparam("new_status"))


class _Open(NamedTuple):
    """What is looked at of an op before its outcome is written."""

    op_id: OpId
    tenant_id: TenantId
    run_id: RunId | None
    sampler_id: SamplerId | None
    kind: OpKind
    state: OpState
    owner: str | None
    payload_blob: BlobKey | None
    meta: dict[str, Any]
    key_id: str | None


def record(conn: Connection, worker: WorkerId, finished: Sequence[Finished], now: float) -> list[OpId]:
    """Record the outcomes of ops that are still open. See `Ops.finish`."""
    for outcome in finished:
        _check(outcome)
    require_current(conn, worker)
    rows = {f.op_id: _Open(*row) for f in finished if (row := _OPEN.first(conn, {"id": f.op_id})) is not None}
    of_runs = (row for row in rows.values() if row.kind != OpKind.SAMPLE)  # one of a sample was changed on the disk
    require_leased(conn, worker, {row.run_id for row in of_runs if row.run_id is not None})
    fresh = {f.op_id: f for f in finished if _is_open(worker, f.op_id, rows.get(f.op_id))}
    for op_id, outcome in fresh.items():
        fresh[op_id] = _unless_taken(conn, outcome, now)
    _write(conn, [(f, rows[f.op_id]) for f in fresh.values()], now)
    number_ends(conn, [(sampler_id, op_id) for op_id in fresh if (sampler_id := rows[op_id].sampler_id) is not None])
    for op_id, outcome in fresh.items():
        row = rows[op_id]
        if row.kind == OpKind.CREATE:
            status = RunStatus.READY if outcome.state is OpState.DONE else RunStatus.FAILED
            conn.execute(_SET_STATUS, {"id": row.run_id, "new_status": status.value})
        if outcome.checkpoint is not None:
            put_checkpoint(conn, row.tenant_id, outcome.checkpoint, now, row.key_id)
            if row.kind == OpKind.SAVE_EXTERNAL:
                _note_export(conn, row, outcome.checkpoint, now)
        if outcome.sampler is not None:
            put_sampler(conn, outcome.sampler, now)
    late = {f.op_id: f.usage for f in finished if f.op_id not in fresh and f.usage is not None}
    meter_cancelled(conn, worker, late, now)
    meter(conn, {op_id: _usage(outcome) for op_id, outcome in fresh.items()}, now)
    return list(fresh)


def _note_export(conn: Connection, row: _Open, made: NewCheckpoint, now: float) -> None:
    by = Principal(row.tenant_id, row.meta.get("actor", ""), row.meta.get("actor_key_id", ""), Scope.FULL)
    path = f"tinker://{made.run_id}/{made.kind}/{made.name}"
    details = {"model_id": made.run_id, "tinker_path": path, "recipients": str(len(row.meta.get("recipients", ())))}
    note(conn, "checkpoint_export", row.tenant_id, by, details, now)


def _usage(outcome: Finished) -> Usage:
    """What is metered: nothing of an op that failed; a checkpoint where one was made."""
    if outcome.state is not OpState.DONE:
        return Usage()
    return replace(outcome.usage or Usage(), checkpoints=0 if outcome.checkpoint is None else 1)


def _unless_taken(conn: Connection, outcome: Finished, now: float) -> Finished:
    """The outcome, or a failure if its checkpoint may not take the place of another; its file is buried then."""
    new = outcome.checkpoint
    if new is None or new.overwrite or not is_taken(conn, new, now):
        return outcome
    bury(conn, [new.blob], now)
    message = (
        f"the run has a checkpoint {new.kind.value}/{new.name} already: save under another name, or with overwrite=True"
    )
    failure = Failure(UserError.code, UserError.category, message)
    return Finished(outcome.op_id, OpState.FAILED, media=JSON, failure=failure)


def _check(outcome: Finished) -> None:
    if outcome.state not in (OpState.DONE, OpState.FAILED):
        raise ValueError(f"an op ends as done or failed, not {outcome.state}")
    if (outcome.state is OpState.FAILED) != (outcome.failure is not None):
        raise ValueError("an op that failed has a failure, and no other has")


def _is_open(worker: WorkerId, op_id: OpId, row: _Open | None) -> bool:
    if row is None:
        raise NotFoundError(f"no op {op_id}")
    if OpState(row.state).is_final:
        return False
    if row.state != OpState.RUNNING or row.owner != worker.slot:
        raise FencedError(f"op {op_id} is {row.state} and was not claimed by worker {worker.slot}")
    return True


def _write(conn: Connection, outcomes: Sequence[tuple[Finished, _Open]], now: float) -> None:
    keep: list[dict[str, Any]] = []
    drop: list[dict[str, Any]] = []
    for outcome, row in outcomes:
        is_replayed = outcome.state is OpState.DONE and OpKind(row.kind).has_effect
        (keep if is_replayed else drop).append(_columns(outcome, now))
    if keep:
        _FINISH.run_many(conn, keep)
    if drop:
        _FINISH_AND_FORGET.run_many(conn, drop)
        dropped = {columns["id"] for columns in drop}
        bury(conn, [row.payload_blob for outcome, row in outcomes if outcome.op_id in dropped], now)


def _columns(outcome: Finished, now: float) -> dict[str, Any]:
    failure = outcome.failure
    return {
        "id": outcome.op_id,
        "now": now,
        "new_state": outcome.state.value,
        "new_result": outcome.result,
        "new_result_crc": crc_of(outcome.result),
        "new_result_blob": outcome.result_blob,
        "new_result_bytes": outcome.result_bytes,
        "new_routes_blob": outcome.routes_blob,
        "new_routes_bytes": outcome.routes_bytes or None,
        "new_result_media": outcome.media,
        "code": failure.code if failure else None,
        "category": failure.category if failure else None,
        "message": failure.message if failure else None,
    }
