"""Rows that go along with a ring, so that who is woken needs no look at the store for them.

A note is a hint like the ring itself: it may be lost, and come late. What stays true: a row is told only after the
transaction that made it so was committed; the worker still claims in the store what it is told of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from tinsmith.ipc.bell import MAX_NOTE_BYTES, PLAIN
from tinsmith.store.rows import OpRow

MAX_ROWS = 8  # more are looked up in one go, at less for each

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[OpRow])


def note_of(rows: Sequence[OpRow | None]) -> bytes:
    """What tells of these rows, without their payloads; a plain ring if one can't be told, or they are too much."""
    if len(rows) > MAX_ROWS:
        return PLAIN
    told = [msgspec.structs.replace(row, payload=None) for row in rows if row is not None]
    if len(told) < len(rows) or sum(len(row.result or b"") for row in told) > MAX_NOTE_BYTES:
        return PLAIN
    note = _ENCODER.encode(told)
    return note if len(note) <= MAX_NOTE_BYTES else PLAIN


def rows_in(notes: Iterable[bytes] | None) -> list[OpRow] | None:
    """All that was told; None: it has to be looked up."""
    if notes is None:
        return None
    try:
        return [row for note in notes for row in _DECODER.decode(note)]
    except msgspec.MsgspecError:
        return None
