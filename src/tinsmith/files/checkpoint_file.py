"""A run's state as one safetensors file, and back; and where its tensors lie. Numpy only; no pickle, no torch.

Tensors lie in the order of the state, so that a part which is one flat row in memory is one flat row in the file: it is
written and read in one piece. A file whose tensors lie in another order loads as well, tensor by tensor.
The header's metadata has one entry, a JSON object with the format, the optimizer step and the spec (several entries
would come out of the library in a new order each time); tensors are named as in `RunState`.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec
import numpy as np
from msgspec import Struct

from tinsmith.errors import CorruptError
from tinsmith.files.blobs import Digest
from tinsmith.types import FloatArray, RunSpec, RunState

FORMAT = "tinsmith-run-state-1"
ENTRY = "tinsmith"
METADATA = "__metadata__"
MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**53
ALIGNMENT = 64
PIECE_BYTES = 4 * 2**20


class Label(Struct):
    """What the metadata says; `spec` as in `RunState`."""

    format: str
    step: int
    spec: RunSpec


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A float32 tensor, and its bytes `offset`..`offset + size` of the file (little-endian)."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class StoredState:
    """A run state in a file, without its numbers; tensors in the order of the file."""

    spec: RunSpec
    step: int
    tensors: tuple[StoredTensor, ...]


def dump_state(state: RunState) -> bytes:
    """The file's bytes. Equal states, their tensors in the same order, give equal bytes."""
    return b"".join(state_pieces(state))


def state_pieces(state: RunState) -> Iterator[memoryview]:
    """The same piece by piece, without a copy of the tensors: they must not change until the last one is taken."""
    shapes = {name: tensor.shape for name, tensor in state.tensors.items()}
    yield memoryview(state_header(state.spec, state.step, shapes))
    for _, group in itertools.groupby(state.tensors.items(), key=lambda named: named[0].partition("/")[0]):
        tensors = [tensor for _, tensor in group]
        whole = one_piece(tensors)
        for array in tensors if whole is None else [whole]:
            yield np.ascontiguousarray(array, dtype="<f4").reshape(-1).view(np.uint8).data


def state_header(spec: RunSpec, step: int, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What stands before the tensors, which follow in this order without gaps, little-endian float32."""
    label = msgspec.json.encode(Label(FORMAT, step, spec)).decode()
    header: dict[str, Any] = {METADATA: {ENTRY: label}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = msgspec.json.encode(header)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def load_state(data: bytes) -> RunState:
    """The state in a file's bytes.

    Raises:
        CorruptError: it isn't such a file, or is cut short.
    """
    return read_state(io.BytesIO(data))


def read_state(
    file: BinaryIO, digest: Digest | None = None, *, make_row: Callable[[int], FloatArray] | None = None
) -> RunState:
    """The state in a file, each of its parts read into one array of its own, aligned as torch aligns its own.

    Args:
        digest: is given all of the file's bytes, beside the reading.
        make_row: makes room for so many numbers; `aligned_row` where it isn't given.

    Raises:
        CorruptError: it isn't such a file, or is cut short.
    """
    stored = read_state_header(file)
    begin = stored.tensors[0].offset if stored.tensors else file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(begin)
    if digest is not None:
        digest.update(head)
    tensors: dict[str, FloatArray] = {}
    for _, group in itertools.groupby(stored.tensors, key=lambda tensor: tensor.name.partition("/")[0]):
        of_part = list(group)
        if any(tensor.offset != at for tensor, at in zip(of_part, _ends(of_part, file.tell()), strict=False)):
            raise CorruptError("unreadable run state: its tensors overlap, or there are holes between them")
        row = (make_row or aligned_row)(sum(tensor.size for tensor in of_part) // 4)
        _fill(file, row, digest)
        start = 0
        for tensor in of_part:
            end = start + tensor.size // 4
            tensors[tensor.name] = row[start:end].reshape(tensor.shape)
            start = end
    if file.read(1):
        raise CorruptError("unreadable run state: there is more in the file than its header names")
    return RunState(spec=stored.spec, step=stored.step, tensors=tensors)


def _fill(file: BinaryIO, row: FloatArray, digest: Digest | None) -> None:
    """Read a row; each piece is digested while the next one is read."""
    data = row.view(np.uint8).data
    with ThreadPoolExecutor(1) if len(data) > PIECE_BYTES else nullcontext() as beside:
        at = 0
        while at < len(data):
            num_read = file.readinto(data[at : at + PIECE_BYTES])  # type: ignore[attr-defined]
            if not num_read:
                raise CorruptError("a run state that is cut short")
            piece = data[at : at + num_read]
            at += num_read
            if digest is not None and beside is not None:
                beside.submit(digest.update, piece)
            elif digest is not None:
                digest.update(piece)


def aligned_row(count: int) -> FloatArray:
    """Room for float32 numbers, at an address that is a multiple of `ALIGNMENT`: products of what lies elsewhere may
    round otherwise."""
    room = np.empty(count * 4 + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + count * 4].view(np.float32)


def one_piece(tensors: Sequence[FloatArray]) -> FloatArray | None:
    """The flat array of which float32 arrays are the views, one after the other without a gap; None if they aren't."""
    owner, at = tensors[0].base, tensors[0].ctypes.data
    if owner is None:
        return None
    for tensor in tensors:
        is_next = tensor.dtype == np.float32 and tensor.flags.c_contiguous and tensor.ctypes.data == at
        if tensor.base is not owner or not is_next:
            return None
        at += tensor.nbytes
    size = (at - tensors[0].ctypes.data) // 4
    return np.lib.stride_tricks.as_strided(tensors[0].reshape(-1), (size,), (4,), writeable=tensors[0].flags.writeable)


def _ends(tensors: Sequence[StoredTensor], begin: int) -> Iterator[int]:
    """Where each tensor begins if they follow upon each other from `begin` on."""
    return itertools.accumulate((tensor.size for tensor in tensors), initial=begin)


def read_state_header(file: BinaryIO) -> StoredState:
    """What the file of a state holds and where, from its header alone.

    Raises:
        CorruptError: it isn't such a file, or is cut short.
    """
    size = file.seek(0, io.SEEK_END)
    header, begin = _header(file, size)
    label = _label(header)
    try:
        stored = [
            StoredTensor(name, tuple(entry["shape"]), begin + entry["data_offsets"][0], _num_bytes(entry))
            for name, entry in header.items()
            if name != METADATA
        ]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise CorruptError(f"unreadable run state: {error}") from error
    stored.sort(key=lambda tensor: tensor.offset)
    if any(tensor.offset < begin or tensor.offset + tensor.size > size for tensor in stored):
        raise CorruptError("a run state that is cut short: a tensor lies outside of the file")
    return StoredState(label.spec, label.step, tuple(stored))


def _label(header: dict[str, Any]) -> Label:
    try:
        label = msgspec.json.decode(header[METADATA][ENTRY], type=Label)
    except (KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise CorruptError(f"unreadable run state: {error}") from error
    if label.format != FORMAT:
        raise CorruptError(f"not a run state: format {label.format[:40]!r}, expected {FORMAT!r}")
    return label


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """(the header, where the tensors begin)."""
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CorruptError("not a safetensors file: shorter than its header length")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CorruptError(f"not a safetensors file: a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise CorruptError("not a safetensors file: its header is no JSON") from error
    if not isinstance(header, dict):
        raise CorruptError("not a safetensors file: its header is no object")
    return header, 8 + length


def _num_bytes(entry: dict[str, Any]) -> int:
    """Raises: ValueError: it isn't a float32 tensor, or its shape and its place disagree."""
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    are_whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    is_fit = (
        are_whole and len(shape) <= MAX_DIMENSIONS and math.prod(max(1, length) for length in shape) <= MAX_ELEMENTS
    )
    if entry["dtype"] != "F32" or not is_fit or math.prod(shape) * 4 != end - begin:
        raise ValueError(f"a tensor of type {entry['dtype']} and shape {str(shape)[:100]} at {begin} to {end}")
    return int(end - begin)
