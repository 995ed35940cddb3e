"""A file that is put together from given bytes and from stretches of a stored one, and read from any place.

Nothing is copied: a file of any size costs its list of pieces. Knows positions and bytes, no formats.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import BinaryIO, TypeAlias

READ_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Span:
    """`size` bytes of the stored file, from `offset` on."""

    offset: int
    size: int


Piece: TypeAlias = bytes | Span


class VirtualFile:
    """The file that the pieces make up, in order. `size` in bytes."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = tuple(_merged(pieces))
        self.size = sum(_size(piece) for piece in self._pieces)

    @classmethod
    def whole(cls, size: int) -> VirtualFile:
        """The stored file as it is."""
        return cls([Span(0, size)])

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def read(self, source: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Bytes start..stop of the file, in parts of at most `READ_BYTES`.

        Args:
            source: the stored file, seekable; it must stay open until the last part was taken.

        Raises:
            EOFError: the stored file is shorter than the pieces say.
        """
        stop = self.size if stop is None else min(stop, self.size)
        position = 0
        for piece in self._pieces:
            begin, end = max(start - position, 0), min(stop - position, _size(piece))
            position += _size(piece)
            while begin < end:
                take = min(end - begin, READ_BYTES)
                yield piece[begin : begin + take] if isinstance(piece, bytes) else _read(source, piece, begin, take)
                begin += take


class Pieces(io.RawIOBase):
    """Pieces of memory, one after another, as a file to read from; nothing is copied before it is read."""

    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self._pieces = [piece.cast("B") for piece in pieces if piece.nbytes]
        self._starts = [0, *accumulate(map(len, self._pieces))]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._starts[-1]}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes, or what is left of them."""
        stop = self._starts[-1] if size is None or size < 0 else min(self._at + size, self._starts[-1])
        found: list[memoryview] = []
        while self._at < stop:
            index = bisect_right(self._starts, self._at) - 1
            begin = self._at - self._starts[index]
            found.append(self._pieces[index][begin : begin + stop - self._at])
            self._at += len(found[-1])
        return b"".join(found)


def _merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same without empty pieces, and with neighbours in one."""
    last: Piece = b""
    for piece in pieces:
        if not _size(piece):
            continue
        if isinstance(last, bytes) and isinstance(piece, bytes):
            last += piece
        elif isinstance(last, Span) and isinstance(piece, Span) and last.offset + last.size == piece.offset:
            last = Span(last.offset, last.size + piece.size)
        else:
            if _size(last):
                yield last
            last = piece
    if _size(last):
        yield last


def _size(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.size


def _read(source: BinaryIO, span: Span, begin: int, size: int) -> bytes:
    source.seek(span.offset + begin)
    data = source.read(size)
    if len(data) != size:
        raise EOFError(f"the stored file ends {size - len(data)} bytes too early")
    return data
