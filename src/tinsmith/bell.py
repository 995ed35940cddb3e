"""Wake-up hints between processes, over a unix datagram socket.

A ring says "look again" and carries nothing. It may be lost: nobody listens, the socket's buffer is full (then a ring
waits there anyway), the listener has just restarted. A lost one costs a scan interval, never a request.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress
from pathlib import Path
from typing import Self

from tinsmith.errors import ConfigError

MAX_PATH_BYTES = 100  # the kernel's limit is 108 on Linux, 104 on macOS


class Bell:
    """Where one process listens. In an event loop: add `fileno()` as a reader, and call `wait(0)` to drain it.

    Raises:
        ConfigError: the path is too long for a socket.
    """

    def __init__(self, path: Path) -> None:
        check_path(path)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        path.unlink(missing_ok=True)
        self._socket.bind(os.fspath(path))
        self._inode = path.stat().st_ino
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a ring at most that long. True if there was any since the last call; all of them are taken."""
        if not self._poll.poll(max(0.0, timeout_s) * 1000):
            return False
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(16)
        return True

    def close(self) -> None:
        """Stop listening; a bell that another process has put in this place meanwhile stays."""
        self._socket.close()
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()


class Ringer:
    """Rings the bell at a path, whether or not anybody listens there. May be called from any thread.

    Raises:
        ConfigError: the path is too long for a socket.
    """

    def __init__(self, path: Path) -> None:
        check_path(path)
        self._path = os.fspath(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def ring(self) -> None:
        """Never waits, and never raises for a listener that is away or busy."""
        with suppress(OSError):
            self._socket.sendto(b"\0", self._path)

    def close(self) -> None:
        self._socket.close()


def check_path(path: Path) -> None:
    """Raises: ConfigError: the path is too long for a socket."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"the path {path} is longer than a socket's {MAX_PATH_BYTES} bytes: choose a shorter --data-dir"
        )
