"""Weights that are put together have mappings of their own, in a process whose heap keeps large blocks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tinsmith.config import heap_block_bytes

SCRIPT = """
import ctypes
from tinsmith.machine.large_blocks import LARGE_BYTES, large_blocks_apart

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names.split()]})
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes = Info, ctypes.c_void_p, [ctypes.c_size_t]

def mapped(num_bytes):
    before = libc.mallinfo2().hblks
    assert libc.malloc(num_bytes)
    return libc.mallinfo2().hblks - before

print(mapped(4 * LARGE_BYTES), end=" ")
with large_blocks_apart():
    print(mapped(4 * LARGE_BYTES), mapped(LARGE_BYTES // 4), end=" ")
print(mapped(4 * LARGE_BYTES))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such threshold")
def test_large_blocks_are_mapped_alone_for_as_long_as_was_asked() -> None:
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 2**20)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "0", "0"]


@pytest.mark.parametrize(("told", "expected"), [({}, None), ({"MALLOC_MMAP_THRESHOLD_": "4096"}, 4096)])
def test_the_usual_size_is_the_environments(told: dict[str, str], expected: int | None) -> None:
    assert heap_block_bytes(told) == expected
