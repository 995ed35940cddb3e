"""Running out of memory: which errors say so, and what to do before trying again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from tinsmith.errors import NoMemoryError
from tinsmith.machine import host_memory

# what torch, the C++ library, oneDNN and cuBLAS say as a plain RuntimeError
PHRASES = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "out of memory",
    "could not create a memory object",
    "could not create a primitive",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for something; the same may go well with less of it, or later."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Raises:
    NoMemoryError: in place of what torch raises when there is none.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NoMemoryError(
            f"there is no memory for {what} at the moment, and the request had no effect: send it again later, or have "
            "the server given more memory"
        ) from None


def reclaim() -> None:
    """Let go of what nobody uses: the graph of a failed backward, cycles, and freed memory that is kept for later.

    Tasks of a failed backward stay in autograd's queue of this thread, and the graph with them, until the next backward
    takes them out.
    """
    with torch.enable_grad():
        torch.zeros(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    gc.collect(1)  # what a failed pack left is young; all generations would take a quarter of a second
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    host_memory.give_back()
