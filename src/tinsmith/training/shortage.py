"""Running out of memory: which errors say so, and what to do before trying again."""

from __future__ import annotations

import gc

import torch

from tinsmith import host_memory

# what torch, the C++ library, oneDNN and cuBLAS say as a plain RuntimeError
PHRASES = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "out of memory",
    "could not create a memory object",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for something; the same may go well with less of it, or later."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def reclaim() -> None:
    """Let go of what nobody uses: cycles, cached blocks of the device, freed memory that the C library keeps."""
    gc.collect(1)  # what a failed pack left is young; all generations would take a quarter of a second
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    host_memory.give_back()
