"""Rows that can't be, asked of the whole database at once: words that nothing knows, requests that are missing in a
log, files of other objects, tables and columns that are gone.

Each check is a statement that selects who is at odds, and what is wrong with it. What stays true: a row that this
version writes, or that a migration left, is in none of them at any moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from itertools import islice
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    LargeBinary,
    Select,
    Text,
    and_,
    case,
    cast,
    exists,
    func,
    inspect,
    literal,
    or_,
    select,
)
from sqlalchemy.sql.functions import coalesce

from tinsmith.files.blobs import DIGEST_CHARS
from tinsmith.scopes import Scope
from tinsmith.store.quota_rules import Quota
from tinsmith.store.schema import (
    Meta,
    checkpoints,
    dead_blobs,
    keys,
    metadata,
    ops,
    quotas,
    runs,
    samplers,
    sessions,
    tenants,
    usage,
    usage_days,
)
from tinsmith.types import CheckpointKind, OpKind, OpState, RunStatus

AT_ONCE = 1000  # rows in memory, without payloads and results
Check = tuple[Select[Any], str]

PATH = literal("tinker://") + checkpoints.c.run_id + "/" + checkpoints.c.kind + "/" + checkpoints.c.name
_FINAL = [state.value for state in OpState if state.is_final]
_HAS_LOG = and_(runs.c.gone_at.is_(None), runs.c.status.not_in([RunStatus.COPY.value, RunStatus.GONE.value]))


def schema_faults(conn: Connection) -> Iterator[tuple[str, str]]:
    """Tables and columns that this version needs and the database lacks: the table, and what is wrong."""
    there = inspect(conn)
    names = set(there.get_table_names())
    for table in metadata.sorted_tables:
        if table.name not in names:
            yield table.name, "the table is gone"
            continue
        columns = {column["name"] for column in there.get_columns(table.name)}
        for column in table.columns:
            if column.name not in columns:
                yield table.name, f"its column {column.name} is gone"


def unreadable_texts(conn: Connection, most: int) -> Iterator[tuple[str, str]]:
    """Rows with texts that are no UTF-8, at which the driver stumbles, at most so many of a table: whose, and which."""
    for table in metadata.sorted_tables:
        columns = [column for column in table.columns if isinstance(column.type, Text | JSON | Meta)]
        rows = conn.execute(select(*(cast(column, LargeBinary) for column in columns))).yield_per(AT_ONCE)
        broken = (row for row in rows if not _is_text(b"\0".join(value for value in row if value is not None)))
        for row in islice(broken, most):
            names = [column.name for column, value in zip(columns, row, strict=True) if not _is_text(value or b"")]
            yield f"{table.name} {row[0].decode(errors='backslashreplace')}", f"its {', '.join(names)} can't be read"


def _is_text(stored: bytes) -> bool:
    try:
        stored.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unknown(owner: ColumnElement[Any], column: Column[str], words: type[StrEnum]) -> Check:
    return select(owner).where(column.not_in([word.value for word in words])), f"its {column.name} is no known one"


def _unreadable(owner: ColumnElement[Any], column: Column[Any]) -> Check:
    """Of a column of JSON; one without a value is none."""
    is_broken = and_(column.is_not(None), func.json_valid(cast(column, Text)) == 0)
    return select(owner).where(is_broken), f"its {column.name} can't be read"


def _begins_otherwise(blob: Column[str], *parts: ColumnElement[str] | str) -> ColumnElement[bool]:
    """The file lies elsewhere than under tenants/ and these parts, in which a colon is a dash (see `blobs`)."""
    begin: ColumnElement[Any] = literal("tenants/")
    for part in parts:
        begin = begin + part
    begin = func.replace(begin, ":", "-")
    return func.substr(blob, 1, func.length(begin)) != begin


def _of_another(blob: Column[str], area: str) -> ColumnElement[bool]:
    return _begins_otherwise(blob, ops.c.tenant_id, f"/{area}/", ops.c.op_id, ".")


def _snapshot_of_another(blob: Column[str], seq: Column[int]) -> ColumnElement[bool]:
    return _begins_otherwise(blob, runs.c.tenant_id, "/snapshots/", runs.c.run_id, "/", cast(seq, Text), "-")


_ARRIVED = (
    select(func.count())
    .select_from(ops)
    .where(ops.c.run_id == runs.c.run_id, ops.c.seq_id > runs.c.pruned_seq, ops.c.seq_id <= runs.c.head_seq)
    .correlate(runs)
    .scalar_subquery()
)

CHECKS: tuple[Check, ...] = (
    _unknown(ops.c.op_id, ops.c.kind, OpKind),
    _unknown(ops.c.op_id, ops.c.state, OpState),
    _unknown(runs.c.run_id, runs.c.status, RunStatus),
    _unknown(PATH, checkpoints.c.kind, CheckpointKind),
    _unknown(keys.c.key_id, keys.c.scope, Scope),
    _unknown(literal("quota of ") + quotas.c.scope, quotas.c.quota, Quota),
    _unreadable(ops.c.op_id, ops.c.meta),
    _unreadable(runs.c.run_id, runs.c.spec),
    _unreadable(runs.c.run_id, runs.c.user_metadata),
    _unreadable(sessions.c.session_id, sessions.c.tags),
    _unreadable(sessions.c.session_id, sessions.c.user_metadata),
    _unreadable(samplers.c.sampler_id, samplers.c.spec),
    _unreadable(PATH, checkpoints.c.user_metadata),
    (select(ops.c.op_id).where(_of_another(ops.c.payload_blob, "payloads")), "its payload is another request's file"),
    (select(ops.c.op_id).where(_of_another(ops.c.result_blob, "results")), "its result is another request's file"),
    (select(ops.c.op_id).where(_of_another(ops.c.routes_blob, "routes")), "its routes are another request's file"),
    (
        select(runs.c.run_id).where(_snapshot_of_another(runs.c.snapshot_blob, runs.c.snapshot_seq)),
        "its snapshot is a file of another run or moment",
    ),
    (
        select(runs.c.run_id).where(_snapshot_of_another(runs.c.previous_blob, runs.c.previous_seq)),
        "the snapshot before its newest is a file of another run or moment",
    ),
    (
        select(PATH).where(
            func.substr(checkpoints.c.blob, -DIGEST_CHARS) != func.substr(checkpoints.c.sha256, 1, DIGEST_CHARS)
        ),
        "its digest is not that of its file",
    ),
    (
        select(runs.c.run_id).where(
            dead_blobs.c.blob.in_([runs.c.snapshot_blob, coalesce(runs.c.previous_blob, "")]),
        ),
        "a snapshot of it is to be deleted",
    ),
    (
        select(ops.c.op_id).where(ops.c.finished_at.is_(None) == case((ops.c.state.in_(_FINAL), True), else_=False)),
        "its state and the time of its end don't fit together",
    ),
    (
        select(ops.c.op_id).where(ops.c.state == OpState.FAILED.value, ops.c.failure_code.is_(None)),
        "it failed, and nothing says why",
    ),
    (
        select(ops.c.op_id).where(ops.c.state == OpState.RUNNING.value, ops.c.owner.is_(None)),
        "it is being carried out, and nobody does it",
    ),
    (
        select(runs.c.run_id).where(_HAS_LOG, runs.c.head_seq - runs.c.pruned_seq > _ARRIVED),
        "requests are missing in its log: it would be computed again without them",
    ),
    (
        select(runs.c.run_id).where(
            _HAS_LOG,
            or_(
                exists().where(ops.c.run_id == runs.c.run_id, ops.c.seq_id == runs.c.head_seq + 1).correlate(runs),
                exists().where(ops.c.run_id == runs.c.run_id, ops.c.seq_id > runs.c.max_seq).correlate(runs),
            ),
        ),
        "requests of it have arrived that it doesn't know of: they would never be carried out",
    ),
    (
        select(ops.c.op_id).where(ops.c.is_expired, ops.c.state.not_in(_FINAL)),
        "its result is said to be gone, and it has not ended",
    ),
    (select(tenants.c.tenant_id).where(tenants.c.weight <= 0), "its weight is no share of anything"),
    (select(literal("usage of ") + usage.c.run_id).where(usage.c.quantity < 0), "it is less than nothing"),
    (select(literal("usage of ") + usage_days.c.run_id).where(usage_days.c.quantity < 0), "it is less than nothing"),
)
