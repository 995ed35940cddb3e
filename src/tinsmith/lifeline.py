"""Ends this process once its parent is gone, however the parent ended.

The parent holds the write end of a pipe that nobody ever writes to; each child inherits the read end. The kernel
closes the write end with the parent, `kill -9` included, and the read then returns. What was acknowledged is in the
store, so a child may end at once.
"""

from __future__ import annotations

import os
import threading

ORPHANED = 3  # the exit status of a child that has lost its parent


def watch(fd: int) -> threading.Thread:
    """Start a daemon thread that ends the process, without clean-up, when the write end of `fd` closes."""
    thread = threading.Thread(target=_end_with, args=(fd,), name="lifeline", daemon=True)
    thread.start()
    return thread


def _end_with(fd: int) -> None:
    while os.read(fd, 64):
        pass
    os._exit(ORPHANED)
