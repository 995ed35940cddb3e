"""Checksums of payloads and results that stand in a row itself, as files have their digests.

CRC-32: it is there for a disk's faults, at a microsecond for the few KiB of a row. What stays true: a checksum is
written by the statement that writes what it is of, and says nothing once that was forgotten. None: it was written
before there were checksums, or came with a ring and never lay in the database; it can't be checked.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from sqlalchemy import Column, Connection, LargeBinary, cast, func, select

from tinsmith.errors import CorruptError
from tinsmith.store.rows import OpRow
from tinsmith.store.schema import ops

AT_ONCE = 100  # rows in memory, each of up to `inline_bytes`
CHANGED = "it stands in its row, and was changed on the disk"


@dataclass(frozen=True, slots=True)
class Checked:
    """damaged: requests of which it is; num_unchecked: how many have no checksum."""

    damaged: list[str]
    num_unchecked: int


def crc_of(data: bytes | None) -> int | None:
    """32 bits, unsigned."""
    return None if data is None else zlib.crc32(data)


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


def _check(conn: Connection, data: Column[bytes], crc: Column[int]) -> Checked:
    form = func.typeof(data)  # a bit of its row's header makes a text of it (see `op_rows`)
    query = select(ops.c.op_id, cast(data, LargeBinary), form, crc).where(data.is_not(None), crc.is_not(None))
    rows = conn.execute(query).yield_per(AT_ONCE)
    damaged = [op_id for op_id, stored, kind, expected in rows if kind != "blob" or zlib.crc32(stored) != expected]
    unchecked = select(func.count()).select_from(ops).where(data.is_not(None), crc.is_(None))
    return Checked(damaged, int(conn.execute(unchecked).scalar_one()))
