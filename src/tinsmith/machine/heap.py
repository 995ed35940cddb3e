"""Spares the garbage collector what lives as long as the process.

Modules, routes, compiled statements and a loaded model are hundreds of thousands of objects that never become garbage,
and a full collection walks them all: it took a third of the API's processor time, and a sixth of loading torch.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

ALLOCATIONS = 10_000  # between two collections of what is young; CPython's default is 700


@contextmanager
def undisturbed() -> Iterator[None]:
    """Nothing is collected while modules are loaded: what they make is there to stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle() -> None:
    """All that is there now stays: call it once, when a process has started."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS, 20, 20)
