"""Copies of weights whose files aren't written yet: how much memory they take, and which requests wait for it.

A save copies its run and leaves the file to the writer, so a client that saves faster than the disk writes would fill
the memory. What stays true: once the copies take more than `max_bytes` no further save begins, nor anything behind it
in its run, until some are written; so beside one save of each run in memory they stay within the bound.
"""

from __future__ import annotations

from collections.abc import Iterable

from tinsmith.store.rows import OpRow
from tinsmith.types import RunId


class Unwritten:
    """For the loop's thread."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes

    def add(self, num_bytes: int) -> None:
        """A copy was made."""
        self.num_bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        """Its file is written, or given up."""
        self.num_bytes -= num_bytes

    def runnable(self, ops: Iterable[OpRow]) -> list[OpRow]:
        """Those that need not wait. ops: of each run in the order of its log."""
        if self.num_bytes <= self._max_bytes:
            return list(ops)
        waiting: set[RunId | None] = set()
        chosen: list[OpRow] = []
        for op in ops:
            if op.kind.is_save:
                waiting.add(op.run_id)
            if op.run_id not in waiting:
                chosen.append(op)
        return chosen
