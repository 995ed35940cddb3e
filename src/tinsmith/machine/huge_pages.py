"""Blocks of memory that lie side by side in huge pages, for what is read from end to end again and again.

Looking up pages of 4 KiB costs a sixth of reading memory once. A block with pages of its own would waste half a huge
page, or end in small ones, as one of the C library's also begins; here the end of a block and the beginning of the next
share one. A block that is let go of leaves a hole, whose memory goes back to the system at once, and which later blocks
fill. Where the system has no huge pages, small ones serve.
What stays true: beside its blocks a chunk takes less than a huge page at each end of a hole.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

HUGE_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20  # of addresses: what no block has touched takes no memory
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
FORGET = getattr(mmap, "MADV_DONTNEED", None)


@dataclass(eq=False)
class _Chunk:
    """holes: where they begin and how long they are, in bytes from the beginning of `memory`; in order, none of them
    side by side."""

    memory: mmap.mmap
    holes: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, num_bytes: int) -> _Chunk:
        """Begins with a huge page; what is left at its end stays in small ones."""
        memory = mmap.mmap(-1, num_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_BYTES
        whole = num_bytes // HUGE_BYTES * HUGE_BYTES
        if ADVICE is not None and whole:
            with contextlib.suppress(OSError):  # of a kernel that has none
                memory.madvise(ADVICE, start, whole)
        return cls(memory, [(start, num_bytes)])

    def take(self, num_bytes: int) -> int | None:
        """Where a block now begins: in the first hole that is large enough."""
        for index, (start, size) in enumerate(self.holes):
            if size >= num_bytes:
                self.holes[index : index + 1] = [(start + num_bytes, size - num_bytes)] if size > num_bytes else []
                return start
        return None

    def give(self, start: int, num_bytes: int) -> None:
        if FORGET is not None:
            self.memory.madvise(FORGET, start, num_bytes)
        merged: list[tuple[int, int]] = []
        for begin, size in sorted([*self.holes, (start, num_bytes)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((begin, size))
        self.holes = merged


class HugePages:
    """Blocks of float32 numbers. Any thread may take one, and let go of it."""

    def __init__(self) -> None:
        self._chunks: dict[_Chunk, int] = {}  # and the number of their blocks
        self._left: deque[tuple[_Chunk, int, int]] = deque()  # by blocks that nobody has any more
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of all blocks, in whole pages."""
        with self._lock:
            self._sweep()
            taken = (len(c.memory) - HUGE_BYTES - sum(size for _, size in c.holes) for c in self._chunks)
            return sum(taken)

    def empty(self, num: int) -> NDArray[np.float32]:
        """Numbers that mean nothing yet. The memory is taken back once neither this nor a view of it is left.

        Raises:
            MemoryError
        """
        num_bytes = max(1, -(-4 * num // mmap.PAGESIZE)) * mmap.PAGESIZE
        with self._lock:
            self._sweep()
            chunk, start = self._find(num_bytes)
            self._chunks[chunk] += 1
        block = np.frombuffer(chunk.memory, np.float32, num, start)
        weakref.finalize(block, self._release, chunk, start, num_bytes).atexit = False
        return block

    def _find(self, num_bytes: int) -> tuple[_Chunk, int]:
        for chunk in self._chunks:
            start = chunk.take(num_bytes)
            if start is not None:
                return chunk, start
        try:
            made = _Chunk.of(max(CHUNK_BYTES, num_bytes))
        except OSError as error:
            raise MemoryError(f"there is no memory for {num_bytes} bytes ({error})") from error
        self._chunks[made] = 0
        start = made.take(num_bytes)
        assert start is not None
        return made, start

    def _release(self, chunk: _Chunk, start: int, num_bytes: int) -> None:
        """May come at any moment, in the middle of the others too: then it is left to them."""
        self._left.append((chunk, start, num_bytes))
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()

    def _sweep(self) -> None:
        while self._left:
            chunk, start, num_bytes = self._left.popleft()
            self._chunks[chunk] -= 1
            if self._chunks[chunk]:
                chunk.give(start, num_bytes)
            else:
                del self._chunks[chunk]
