"""Blocks of memory that lie side by side in huge pages, for what is read from end to end again and again.

Looking up pages of 4 KiB costs a sixth of reading memory once. A block with pages of its own would waste half a huge
page, or end in small ones, as one of the C library's also begins; here the end of a block and the beginning of the next
share one. Where the system has no huge pages, small ones serve.

Memory that is new to the machine is written ten times as slowly, so a block that is let go of keeps its own for the
next of its size, as what a run publishes again and again, and beside a large one that was taken a thread prepares
another. The oldest of them beyond `WARM_BYTES` leave holes, whose memory goes back to the system, and which later
blocks fill. What stays true: beside its blocks, held or kept, a chunk takes less than a huge page at each end of a
hole.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

HUGE_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20  # of addresses: what no block has touched takes no memory
WARM_BYTES, MAX_WARM = 64 << 20, 64  # of blocks that nobody has, and how many
PREPARED_BYTES = 1 << 20  # a block of so much or more
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

    def __init__(self, warm_bytes: int = WARM_BYTES) -> None:
        self._warm_bytes = warm_bytes
        self._chunks: dict[_Chunk, int] = {}  # and the number of their blocks, held or kept
        self._left: deque[tuple[_Chunk, int, int]] = deque()  # by blocks that nobody has any more
        self._warm: deque[tuple[_Chunk, int, int]] = deque()  # kept of those, the oldest first
        self._lock = threading.Lock()
        self._preparing = ThreadPoolExecutor(1, "huge-pages")  # begins a thread when it is first used

    @property
    def num_bytes(self) -> int:
        """Of all blocks, held or kept, in whole pages."""
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
            chunk, start = self._kept(num_bytes) or self._find(num_bytes)
            is_wanted = PREPARED_BYTES <= num_bytes <= self._warm_bytes // 2 and not self._has(num_bytes)
        if is_wanted:
            self._preparing.submit(self._prepare, num_bytes)
        block = np.frombuffer(chunk.memory, np.float32, num, start)
        weakref.finalize(block, self._release, chunk, start, num_bytes).atexit = False
        return block

    def _has(self, num_bytes: int) -> bool:
        return any(size == num_bytes for _, _, size in self._warm)

    def _prepare(self, num_bytes: int) -> None:
        """Have the machine find memory for a block, unless somebody has let go of one meanwhile."""
        with self._lock:
            self._sweep()
            if self._has(num_bytes):
                return
            try:
                chunk, start = self._find(num_bytes)
            except MemoryError:  # whoever needs it is told
                return
        np.frombuffer(chunk.memory, np.uint8, num_bytes, start)[:: mmap.PAGESIZE] = 0
        self._release(chunk, start, num_bytes)

    def _kept(self, num_bytes: int) -> tuple[_Chunk, int] | None:
        for index, (chunk, start, size) in enumerate(self._warm):
            if size == num_bytes:
                del self._warm[index]
                return chunk, start
        return None

    def _find(self, num_bytes: int) -> tuple[_Chunk, int]:
        for chunk in self._chunks:
            start = chunk.take(num_bytes)
            if start is not None:
                self._chunks[chunk] += 1
                return chunk, start
        try:
            made = _Chunk.of(max(CHUNK_BYTES, num_bytes))
        except OSError as error:
            raise MemoryError(f"there is no memory for {num_bytes} bytes ({error})") from error
        self._chunks[made] = 1
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
            self._warm.append(self._left.popleft())
        num_kept = sum(size for _, _, size in self._warm)
        while num_kept > self._warm_bytes or len(self._warm) > MAX_WARM:
            chunk, start, num_bytes = self._warm.popleft()
            num_kept -= num_bytes
            self._chunks[chunk] -= 1
            if self._chunks[chunk]:
                chunk.give(start, num_bytes)
            else:
                del self._chunks[chunk]
