"""Ends this process once its parent is gone, however the parent ended.

The parent holds the write end of a pipe that nobody ever writes to; each child inherits the read end. The kernel
closes the write end with the parent, `kill -9` included, and the read then returns. What was acknowledged is in the
store, so a child may end at once. On Linux the kernel is asked besides to kill the child with its parent: one that is
stopped, or hangs with the interpreter in its hands, reads no pipe, and would keep the port.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ORPHANED = 3  # the exit status of a child that has lost its parent


def watch(fd: int) -> threading.Thread:
    """Start a daemon thread that ends the process, without clean-up, when the write end of `fd` closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent that is gone already: the pipe says so
    thread = threading.Thread(target=_end_with, args=(fd,), name="lifeline", daemon=True)
    thread.start()
    return thread


def _end_with(fd: int) -> None:
    while os.read(fd, 64):
        pass
    os._exit(ORPHANED)
