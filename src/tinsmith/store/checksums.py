"""Checksums of rows, as files have their digests: of a payload and a result that stand in a request's row, and of what
requests and runs are born with and never changes.

CRC-32: it is there for a disk's faults, at a microsecond for the few KiB of a row. What stays true: a checksum is
written by the statement that writes what it is of, and says nothing once that was forgotten. None: it was written
before there were checksums, or came with a ring and never lay in the database; it can't be checked.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Column, Connection, LargeBinary, Select, Text, bindparam, cast, func, select

from tinsmith.errors import CorruptError
from tinsmith.store.rows import OpRow
from tinsmith.store.schema import ops, runs
from tinsmith.types import RunId

BORN_WITH = (  # in the order in which the checksum of a row takes them, as one JSON array
    ops.c.op_id, ops.c.tenant_id, ops.c.kind, ops.c.base_model, ops.c.run_id, ops.c.sampler_id, ops.c.seq_id,
    ops.c.cost_tokens, ops.c.created_at, ops.c.media, ops.c.payload_bytes, ops.c.key_id, ops.c.meta,
)  # fmt: skip
RUN_BORN_WITH = (
    runs.c.run_id, runs.c.tenant_id, runs.c.session_id, runs.c.model_seq_id, runs.c.base_model, runs.c.created_at,
    runs.c.spec,
)  # fmt: skip
AT_ONCE = 100  # rows in memory, each of up to `inline_bytes`
encode = msgspec.json.Encoder().encode
CHANGED = "it stands in its row, and was changed on the disk"
ROW_CHANGED = "its row was changed on the disk"


@dataclass(frozen=True, slots=True)
class Checked:
    """damaged: requests or runs of which it is; num_unchecked: how many have no checksum."""

    damaged: list[str]
    num_unchecked: int

    def __add__(self, other: Checked) -> Checked:
        return Checked(self.damaged + other.damaged, self.num_unchecked + other.num_unchecked)


def crc_of(data: bytes | None) -> int | None:
    """32 bits, unsigned."""
    return None if data is None else zlib.crc32(data)


def whole_row(op: OpRow) -> OpRow:
    """The same, which was read with its payload.

    Raises:
        CorruptError: what it was born with isn't what was stored, or its row holds what none can.
    """
    if op.is_changed:
        raise row_changed(op.id)
    if op.row_crc is not None:
        born_with = (
            op.id, op.tenant_id, op.kind, op.base_model, op.run_id, op.sampler_id, op.seq_id, op.cost_tokens,
            op.created_at, op.media, op.payload_bytes, op.key_id, op.meta,
        )  # fmt: skip
        if zlib.crc32(encode(born_with)) != op.row_crc:
            raise row_changed(op.id)
    return op


def row_changed(owner: str) -> CorruptError:
    return CorruptError(f"the row of {owner} was changed on the disk; restore the database from a backup")


def whole_payload(op: OpRow) -> bytes | None:
    """What its row holds; None where a file does, or nothing any more.

    Raises:
        CorruptError: it isn't what was stored.
    """
    return _whole(op.payload, op.payload_crc, f"the payload of {op.id}")


def whole_result(op: OpRow) -> bytes | None:
    """As `whole_payload`."""
    return _whole(op.result, op.result_crc, f"the result of {op.id}")


def _whole(data: bytes | None, crc: int | None, what: str) -> bytes | None:
    if crc is not None and data is not None and zlib.crc32(data) != crc:
        raise CorruptError(f"{what} was changed on the disk; restore the database from a backup")
    return data


def check_payloads(conn: Connection) -> Checked:
    return _check(conn, ops.c.payload, ops.c.payload_crc)


def check_results(conn: Connection) -> Checked:
    return _check(conn, ops.c.result, ops.c.result_crc)


def check_rows(conn: Connection) -> Checked:
    """What requests and runs were born with. The connection's texts can be read whatever they hold (`readable`)."""
    return _check_born(conn, BORN_WITH, ops.c.row_crc) + _check_born(conn, RUN_BORN_WITH, runs.c.row_crc)


def check_run(conn: Connection, run_id: RunId) -> None:
    """Raises: CorruptError: what it was born with isn't what was stored."""
    row = conn.execute(_RUN, {"of_run": run_id}).first()
    if row is not None and row[-1] is not None and _crc_of_stored(row[:-2], row[-2]) != row[-1]:
        raise row_changed(f"the run {run_id}")


def _born_with(columns: Sequence[Column[Any]], crc: Column[int]) -> Select[Any]:
    *others, last = columns  # of JSON, as it stands there
    return select(*others, cast(last, Text), crc)


_RUN = _born_with(RUN_BORN_WITH, runs.c.row_crc).where(runs.c.run_id == bindparam("of_run"))


def _check_born(conn: Connection, columns: Sequence[Column[Any]], crc: Column[int]) -> Checked:
    rows = conn.execute(_born_with(columns, crc).where(crc.is_not(None))).yield_per(AT_ONCE)
    damaged = [row[0] for row in rows if _crc_of_stored(row[:-2], row[-2]) != row[-1]]
    unchecked = select(func.count()).where(crc.is_(None))
    return Checked(damaged, int(conn.execute(unchecked).scalar_one()))


def _crc_of_stored(others: Sequence[Any], last: str | None) -> int:
    """As it is computed of the values, of what stands in the row."""
    return zlib.crc32(encode(list(others))[:-1] + b"," + str(last).encode() + b"]")


def _check(conn: Connection, data: Column[bytes], crc: Column[int]) -> Checked:
    form = func.typeof(data)  # a bit of its row's header makes a text of it (see `op_rows`)
    query = select(ops.c.op_id, cast(data, LargeBinary), form, crc).where(data.is_not(None), crc.is_not(None))
    rows = conn.execute(query).yield_per(AT_ONCE)
    damaged = [op_id for op_id, stored, kind, expected in rows if kind != "blob" or zlib.crc32(stored) != expected]
    unchecked = select(func.count()).select_from(ops).where(data.is_not(None), crc.is_(None))
    return Checked(damaged, int(conn.execute(unchecked).scalar_one()))
