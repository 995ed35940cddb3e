"""A run's state as one safetensors file, and back; and where its tensors lie. Numpy only; no pickle, no torch.

The header's metadata has one entry, a JSON object with the format, the optimizer step and the spec (several entries
would come out of the library in a new order each time); tensors are named as in `RunState`.
"""

from __future__ import annotations

import io
import json
import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec
import numpy as np
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from tinsmith.errors import CorruptError
from tinsmith.types import RunSpec, RunState

FORMAT = "tinsmith-run-state-1"
ENTRY = "tinsmith"
METADATA = "__metadata__"
MAX_HEADER_BYTES = 16 * 2**20


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
    """The file's bytes. Equal states give equal bytes."""
    label = msgspec.json.encode(Label(FORMAT, state.step, state.spec)).decode()
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in state.tensors.items()}
    return save_tensors(tensors, metadata={ENTRY: label})


def load_state(data: bytes) -> RunState:
    """The state in a file's bytes.

    Raises:
        CorruptError: it isn't such a file, or is cut short.
    """
    file = io.BytesIO(data)
    try:
        label = _label(_header(file, len(data))[0])
        tensors = load_tensors(data)
    except (TypeError, ValueError, SafetensorError) as error:
        raise CorruptError(f"unreadable run state: {error}") from error
    return RunState(spec=label.spec, step=label.step, tensors=tensors)


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
    except ValueError as error:
        raise CorruptError("not a safetensors file: its header is no JSON") from error
    if not isinstance(header, dict):
        raise CorruptError("not a safetensors file: its header is no object")
    return header, 8 + length


def _num_bytes(entry: dict[str, Any]) -> int:
    """Raises: ValueError: it isn't a float32 tensor, or its shape and its place disagree."""
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "F32" or math.prod(entry["shape"]) * 4 != end - begin:
        raise ValueError(f"a tensor of type {entry['dtype']} and shape {entry['shape']} in {end - begin} bytes")
    return int(end - begin)
