"""Between the columns of `ops` and OpRow: the select lists and the conversion. Knows no statement."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

from sqlalchemy import ColumnElement, LargeBinary, and_, cast, func, null, or_, select

from tinsmith.store.checksums import crc_of, encode
from tinsmith.store.rows import NewOp, OpRow
from tinsmith.store.schema import ops, runs
from tinsmith.types import Failure, OpKind, OpState, RunStatus

_KINDS, _STATES = {kind.value: kind for kind in OpKind}, {state.value: state for state in OpState}
PINNING = (OpKind.CREATE, OpKind.LOAD, OpKind.FORWARD, OpKind.FORWARD_BACKWARD)  # those whose meta names a file

_LIGHT: tuple[ColumnElement[Any], ...] = (
    ops.c.op_id, ops.c.tenant_id, ops.c.kind, ops.c.base_model, ops.c.run_id, ops.c.sampler_id, ops.c.seq_id,
    ops.c.state, ops.c.cost_tokens, ops.c.attempts, ops.c.owner, ops.c.created_at, ops.c.started_at,
    ops.c.finished_at, ops.c.media, ops.c.payload_bytes, ops.c.payload_blob, ops.c.meta, ops.c.result_media,
    ops.c.result_bytes, ops.c.result_blob, ops.c.failure_code, ops.c.failure_category, ops.c.failure_message,
    ops.c.key_id,
)  # fmt: skip
# As bytes whatever the row's header says: a bit of it makes a text of them, over which the driver may stumble, and a
# batch of claims with it.
_PAYLOAD = (cast(ops.c.payload, LargeBinary).label("payload"), ops.c.payload_crc, ops.c.row_crc)
_RESULT = (cast(ops.c.result, LargeBinary).label("result"), ops.c.result_crc)
_NO_PAYLOAD = (null().label("payload"), null().label("payload_crc"), null().label("row_crc"))
_NO_RESULT = (null().label("result"), null().label("result_crc"))
LIGHT = (*_LIGHT, *_NO_PAYLOAD, *_NO_RESULT)
WITH_PAYLOAD = (*_LIGHT, *_PAYLOAD, *_NO_RESULT)
WITH_RESULT = (*_LIGHT, *_NO_PAYLOAD, *_RESULT)
WHOLE = (*_LIGHT, *_PAYLOAD, *_RESULT)


# Nothing needs the row once its result has expired: no recovery of its run, and no file. The newest op of all stays,
# as numbers go on from it; so does the CREATE of a copy, which keeps others from its place. For a statement that has
# `runs` beside, by an outer join.
_ALL_OPS = ops.alias("all_ops")
IS_SPENT: ColumnElement[bool] = and_(
    ops.c.pin_blob.is_(None),
    ops.c.payload_blob.is_(None),
    ops.c.num < select(func.max(_ALL_OPS.c.num)).scalar_subquery(),
    or_(ops.c.run_id.is_(None), and_(runs.c.status != RunStatus.COPY.value, ops.c.seq_id <= runs.c.pruned_seq)),
)

_TEXT, _NUMBER, _TIME = (str,), (int,), (float, int)
_TEXT_OR_NONE, _NUMBER_OR_NONE, _TIME_OR_NONE = (str, NoneType), (int, NoneType), (float, int, NoneType)
_BYTES_OR_NONE = (bytes, NoneType)
_MAY_BE: tuple[tuple[type, ...], ...] = (  # of each column of WHOLE
    _TEXT, _TEXT, _TEXT, _TEXT, _TEXT_OR_NONE, _TEXT_OR_NONE, _NUMBER, _TEXT, _NUMBER, _NUMBER, _TEXT_OR_NONE, _TIME,
    _TIME_OR_NONE, _TIME_OR_NONE, _TEXT, _NUMBER, _TEXT_OR_NONE, (dict,), _TEXT_OR_NONE, _NUMBER, _TEXT_OR_NONE,
    _TEXT_OR_NONE, _TEXT_OR_NONE, _TEXT_OR_NONE, _TEXT_OR_NONE, _BYTES_OR_NONE, _NUMBER_OR_NONE, _NUMBER_OR_NONE,
    _BYTES_OR_NONE, _NUMBER_OR_NONE,
)  # fmt: skip
_KIND, _RUN_ID, _STATE = (_LIGHT.index(column) for column in (ops.c.kind, ops.c.run_id, ops.c.state))
_MOST_SHAPES = 1000
_good_shapes: set[tuple[type, ...]] = set()  # types of rows that were looked at column by column

NEW_COLUMNS = (  # those that `to_columns` fills
    "op_id", "tenant_id", "kind", "base_model", "run_id", "sampler_id", "seq_id", "state", "cost_tokens", "attempts",
    "created_at", "finished_at", "is_expired", "media", "payload_bytes", "payload_blob", "meta", "pin_blob",
    "result_bytes", "failure_code", "failure_category", "failure_message", "payload", "payload_crc",
    "key_id", "row_crc",
)  # fmt: skip


def to_op(row: Sequence[Any]) -> OpRow:
    """An OpRow from a row of LIGHT, WITH_PAYLOAD or WHOLE. What a column can't hold and its row does, since bits of it
    flipped, is something that it can in an OpRow that `is_changed`."""
    shape = tuple(map(type, row))
    is_changed = not (shape in _good_shapes or _is_good(shape)) or not are_words_known(row) or _is_of_both(row)
    if is_changed:
        row = _possible(row)
    (op_id, tenant_id, kind, base_model, run_id, sampler_id, seq_id, state, cost_tokens, attempts, owner, created_at,
     started_at, finished_at, media, payload_bytes, payload_blob, meta, result_media, result_bytes, result_blob,
     code, category, message, key_id, payload, payload_crc, row_crc, result, result_crc) = row  # fmt: skip
    return OpRow(
        id=op_id,
        tenant_id=tenant_id,
        kind=_KINDS[kind],
        base_model=base_model,
        run_id=run_id,
        sampler_id=sampler_id,
        seq_id=seq_id,
        state=_STATES[state],
        cost_tokens=cost_tokens,
        attempts=attempts,
        owner=owner,
        created_at=created_at,
        started_at=started_at,
        finished_at=finished_at,
        media=media,
        payload_bytes=payload_bytes,
        payload_blob=payload_blob,
        meta=meta,
        result_media=result_media,
        result_bytes=result_bytes,
        result_blob=result_blob,
        failure=None if code is None else Failure(code, category, message),
        key_id=key_id,
        payload=payload,
        result=result,
        payload_crc=payload_crc,
        result_crc=result_crc,
        row_crc=row_crc,
        is_changed=is_changed,
    )


def are_words_known(row: Sequence[Any]) -> bool:
    return row[_KIND] in _KINDS and row[_STATE] in _STATES


def _is_of_both(row: Sequence[Any]) -> bool:
    """A sample that names a run."""
    return row[_RUN_ID] is not None and row[_KIND] == OpKind.SAMPLE.value


def is_known(op: OpRow) -> bool:
    """Whether its name is one that a row may have: nothing finds it by another."""
    return op.id != "" and "\\" not in op.id


def _is_good(shape: tuple[type, ...]) -> bool:
    is_good = all(found in may_be for found, may_be in zip(shape, _MAY_BE, strict=True))
    if is_good and len(_good_shapes) < _MOST_SHAPES:
        _good_shapes.add(shape)
    return is_good


def _possible(row: Sequence[Any]) -> list[Any]:
    values = [
        value if type(value) in may_be else None if NoneType in may_be else may_be[0]()
        for value, may_be in zip(row, _MAY_BE, strict=True)
    ]
    if values[_KIND] not in _KINDS:
        values[_KIND] = OpKind.SAMPLE if values[_RUN_ID] is None else OpKind.OPTIM_STEP
    if values[_KIND] == OpKind.SAMPLE.value:
        values[_RUN_ID] = None
    if values[_STATE] not in _STATES:
        values[_STATE] = OpState.QUEUED
    return values


def born(new: NewOp, now: float) -> OpRow:
    """The row that a new op starts as: QUEUED, or FAILED if it was rejected."""
    payload = new.payload if new.failure is None else None
    meta = dict(new.meta)
    born_with = (
        new.id, new.tenant_id, new.kind, new.base_model, new.run_id, new.sampler_id, new.seq_id, new.cost_tokens,
        float(now), new.media, new.payload_bytes, new.key_id, meta,
    )  # fmt: skip
    return OpRow(
        id=new.id,
        tenant_id=new.tenant_id,
        kind=new.kind,
        base_model=new.base_model,
        run_id=new.run_id,
        sampler_id=new.sampler_id,
        seq_id=new.seq_id,
        state=OpState.QUEUED if new.failure is None else OpState.FAILED,
        cost_tokens=new.cost_tokens,
        attempts=0,
        owner=None,
        created_at=now,
        started_at=None,
        finished_at=None if new.failure is None else now,
        media=new.media,
        payload_bytes=new.payload_bytes,
        payload_blob=new.payload_blob if new.failure is None else None,
        meta=meta,
        result_media=None,
        result_bytes=0,
        result_blob=None,
        failure=new.failure,
        key_id=new.key_id,
        payload=payload,
        payload_crc=crc_of(payload),
        row_crc=crc_of(encode(born_with)),
    )


def to_columns(op: OpRow) -> dict[str, Any]:
    """The parameters that insert an op that was just born."""
    failure = op.failure
    return {
        "op_id": op.id,
        "tenant_id": op.tenant_id,
        "kind": op.kind.value,
        "base_model": op.base_model,
        "run_id": op.run_id,
        "sampler_id": op.sampler_id,
        "seq_id": op.seq_id,
        "state": op.state.value,
        "cost_tokens": op.cost_tokens,
        "attempts": 0,
        "created_at": op.created_at,
        "finished_at": op.finished_at,
        "is_expired": False,
        "media": op.media,
        "payload_bytes": op.payload_bytes,
        "payload_blob": op.payload_blob,
        "meta": op.meta,
        "pin_blob": op.meta.get("blob") if op.kind in PINNING and failure is None else None,
        "result_bytes": 0,
        "failure_code": failure.code if failure else None,
        "failure_category": failure.category if failure else None,
        "failure_message": failure.message if failure else None,
        "payload": op.payload,
        "payload_crc": op.payload_crc,
        "key_id": op.key_id,
        "row_crc": op.row_crc,
    }
