"""Keeps the weights of a model out of the C library's heap while they are put together.

`serve` has a worker's heap keep blocks of up to 128 MiB, for the buffers of passes. Weights that come and go there
leave holes, and whether the next one fits into a hole depends on which small objects happen to lie between: up to 200
MiB beside a model of 255. Blocks with a mapping of their own go back to the system when they are freed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from tinsmith.config import heap_block_bytes

M_MMAP_THRESHOLD = -3  # mallopt(3)
LARGE_BYTES = 2**18


@contextmanager
def large_blocks_apart(otherwise_bytes: int | None = None) -> Iterator[None]:
    """Blocks from `LARGE_BYTES` up get mappings of their own, in the whole process; afterwards from the size that the
    environment says, or from `otherwise_bytes` where that says nothing. Nothing changes where neither says it, or
    another C library than glibc allocates."""
    usual_bytes = heap_block_bytes() or otherwise_bytes
    mallopt = _mallopt()
    if usual_bytes is None or mallopt is None or not mallopt(M_MMAP_THRESHOLD, LARGE_BYTES):
        yield
        return
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, usual_bytes)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's; None with another C library."""
    library = ctypes.CDLL(None)
    return cast(Callable[[int, int], int], library.mallopt) if hasattr(library, "gnu_get_libc_version") else None
