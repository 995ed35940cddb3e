"""A run's state as one safetensors file, and back. Numpy only; no pickle, no torch.

The header's metadata has one entry, a JSON object with the format, the optimizer step and the spec (several entries
would come out of the library in a new order each time); tensors are named as in `RunState`.
"""

from __future__ import annotations

import json
import struct
from typing import Any

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
MAX_HEADER_BYTES = 16 * 2**20


class Label(Struct):
    """What the metadata says; `spec` as in `RunState`."""

    format: str
    step: int
    spec: RunSpec


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
    try:
        label = msgspec.json.decode(_metadata(data)[ENTRY], type=Label)
        tensors = load_tensors(data)
    except (KeyError, TypeError, ValueError, msgspec.MsgspecError, SafetensorError) as error:
        raise CorruptError(f"unreadable run state: {error}") from error
    if label.format != FORMAT:
        raise CorruptError(f"not a run state: format {label.format[:40]!r}, expected {FORMAT!r}")
    return RunState(spec=label.spec, step=label.step, tensors=tensors)


def _metadata(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        raise CorruptError("not a safetensors file: shorter than its header length")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise CorruptError(f"not a safetensors file: a header of {length} bytes in a file of {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise CorruptError("not a safetensors file: its header is no JSON") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return metadata if isinstance(metadata, dict) else {}
