"""A turnstile between processes: one may stand in it, and it is free as soon as who stood there has left or died.

A lock on a file of its own, which says nothing about the database: who finds it taken may wait for as long as he likes
and go on without it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Turnstile:
    """For one thread of a process at a time. The file is made when it is first entered."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def enter(self) -> bool:
        """Stand in it. False: another process does."""
        if self._fd is None:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def leave(self) -> None:
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
