"""The part of Perfetto's trace format that a timeline needs, written byte by byte: tracks and nested slices.

Field numbers are those of Perfetto's public definitions: trace_packet.proto, track_descriptor.proto, track_event.proto
and debug_annotation.proto. Times are nanoseconds. What stays true: the slices of one track lie beside or inside one
another, and come in the order of their times; a slice without an end is one that goes on.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

SLICE_BEGIN, SLICE_END = 1, 2
SEQUENCE = 1  # of packets; all come from one writer
VARINT, FIXED64, BYTES = 0, 1, 2


def track(uuid: int, name: str, parent: int | None = None) -> bytes:
    """A packet that describes a track; `uuid` and `parent` are 1 or more."""
    descriptor = _number(1, uuid) + _text(2, name)
    if parent is not None:
        descriptor += _number(5, parent)
    return _packet(_bytes(60, descriptor))


def begin(uuid: int, at_ns: int, name: str, args: Mapping[str, str | int], flow: int | None = None) -> bytes:
    """A packet that begins a slice. flow: slices with the same one, of 64 bits, are joined by arrows."""
    event = b"".join(_bytes(4, _annotation(key, value)) for key, value in args.items())
    event += _number(9, SLICE_BEGIN) + _number(11, uuid) + _text(23, name)
    if flow is not None:
        event += _varint(47 << 3 | FIXED64) + struct.pack("<Q", flow)
    return _packet(_number(8, at_ns) + _bytes(11, event))


def end(uuid: int, at_ns: int) -> bytes:
    """A packet that ends the slice of the track that began last."""
    return _packet(_number(8, at_ns) + _bytes(11, _number(9, SLICE_END) + _number(11, uuid)))


def _packet(content: bytes) -> bytes:
    return _bytes(1, content + _number(10, SEQUENCE))


def _annotation(name: str, value: str | int) -> bytes:
    return _text(10, name) + (_text(6, value) if isinstance(value, str) else _number(4, value))


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode("utf-8", "replace"))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | BYTES) + _varint(len(value)) + value


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    """Negative numbers are written as their two's complement of 64 bits."""
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
