"""A safetensors file of others, or one within an archive: its header under bounds, its tensors as float32, one by one.

Nothing here believes the header: names, types, shapes and places are checked before a byte of a tensor is read, and no
two tensors may share bytes, so what comes out is no larger than twice what came in.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec
import numpy as np

from tinsmith.errors import UserError, echo
from tinsmith.types import FloatArray

MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS = 250_000  # Kimi-K2's experts, one by one, are 140,000; a million held up all threads for seconds
MAX_OTHER_BRACES = 1_000  # of the header itself, and in its metadata
MAX_DIMENSIONS = 4
MAX_NAME_CHARS = 512  # patterns are matched with names, in a time that grows with their square
MAX_ENTRY_BYTES = 1024
MAX_METADATA_BYTES = 1 << 20
METADATA = "__metadata__"
NO_METADATA = msgspec.Raw(b"{}")
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """offset: of its first byte in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """The tensors of `size` bytes at `offset` of a file. Not thread-safe; the file must stay open."""

    def __init__(self, file: BinaryIO, name: str, offset: int, size: int) -> None:
        """name: as messages call it.

        Raises:
            UserError: it isn't a whole safetensors file of floating-point numbers.
        """
        self._file = file
        self._name = name
        self.metadata: Mapping[str, Any] = {}
        header, begin = self._read_header(offset, size)
        self.tensors: Mapping[str, ForeignTensor] = self._checked(header, begin, offset + size)

    def read(self, name: str) -> FloatArray:
        """Raises: UserError: it holds a number that isn't finite."""
        tensor = self.tensors[name]
        self._file.seek(tensor.offset)
        size = math.prod(tensor.shape) * WIDTHS[tensor.dtype]
        data = self._file.read(size)
        if len(data) != size:
            raise UserError(f"{self._name} ends within {echo(name)}: it was not sent whole")
        if tensor.dtype == "BF16":
            values = (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
        else:
            values = np.frombuffer(data, "<f4" if tensor.dtype == "F32" else "<f2").astype("<f4")
        if not np.isfinite(values).all():
            raise UserError(f"{self._name}: {echo(name)} holds numbers that are not finite")
        return values.reshape(tensor.shape)

    def _read_header(self, offset: int, size: int) -> tuple[dict[str, msgspec.Raw], int]:
        """The entries stay text: to build what a hostile header says would hold up all threads."""
        self._file.seek(offset)
        prefix = self._file.read(min(8, size))
        if len(prefix) < 8:
            raise UserError(f"{self._name} is no safetensors file: it is shorter than its header's length")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{self._name} is no safetensors file: a header of {length} bytes in {size}")
        data = self._file.read(length)
        if data.count(b"{") > MAX_TENSORS + MAX_OTHER_BRACES:  # one for each entry at least
            raise UserError(f"{self._name} is no safetensors file: its header names more than {MAX_TENSORS} tensors")
        try:
            header = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            found = msgspec.json.decode(_bounded(header.pop(METADATA, NO_METADATA), MAX_METADATA_BYTES))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UserError(f"{self._name} is no safetensors file: its header can't be read ({error})") from None
        if len(header) > MAX_TENSORS:
            raise UserError(f"{self._name} is no safetensors file: its header names more than {MAX_TENSORS} tensors")
        self.metadata = found if isinstance(found, dict) else {}
        return header, offset + 8 + length

    def _checked(self, header: Mapping[str, msgspec.Raw], begin: int, end: int) -> Mapping[str, ForeignTensor]:
        found: dict[str, tuple[ForeignTensor, int]] = {}
        for name, raw in header.items():
            if len(name) > MAX_NAME_CHARS:
                raise UserError(f"{self._name}: {echo(name)} is longer than {MAX_NAME_CHARS} characters")
            try:
                entry = msgspec.json.decode(_bounded(raw, MAX_ENTRY_BYTES))
                dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
                are_whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
                is_fit = are_whole and len(shape) <= MAX_DIMENSIONS
                if dtype not in WIDTHS:
                    raise UserError(
                        f"{self._name}: {echo(name)} is {str(dtype)[:20]}; weights in F32, F16 and BF16 can be imported"
                    )
                if not is_fit or math.prod(shape) * WIDTHS[dtype] != last - first or begin + last > end:
                    raise ValueError("its shape and its place disagree")
            except (msgspec.MsgspecError, KeyError, TypeError, ValueError, RecursionError) as error:
                raise UserError(f"{self._name}: the entry of {echo(name)} is broken ({error})") from None
            found[name] = ForeignTensor(dtype, tuple(shape), begin + first), begin + last
        at = begin
        for name, (tensor, last) in sorted(found.items(), key=lambda item: (item[1][0].offset, item[1][1])):
            if tensor.offset < at:
                raise UserError(f"{self._name}: {echo(name)} shares bytes with another tensor")
            at = last
        return {name: tensor for name, (tensor, _) in found.items()}


def _bounded(raw: msgspec.Raw, max_bytes: int) -> msgspec.Raw:
    """Raises: ValueError: it is longer."""
    if len(memoryview(raw)) > max_bytes:
        raise ValueError(f"longer than {max_bytes} bytes")
    return raw
