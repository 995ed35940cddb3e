"""Unix datagram sockets at a path: whole messages from any process of this machine to the one that listens there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tinsmith.errors import ConfigError

MAX_PATH_BYTES = 100  # the kernel's limit is 108 on Linux, 104 on macOS


class DatagramListener:
    """Takes the path from whoever had it. In an event loop: add `fileno()` as a reader, and drain `received`.

    Raises:
        ConfigError: the path is too long for a socket.
    """

    def __init__(self, path: Path) -> None:
        _check(path)
        self.path = path
        self._socket = _socket()
        path.unlink(missing_ok=True)
        self._socket.bind(os.fspath(path))
        self._inode = path.stat().st_ino

    def fileno(self) -> int:
        return self._socket.fileno()

    def received(self, max_bytes: int) -> Iterator[bytes]:
        """All that wait, each cut at `max_bytes`; never blocks."""
        with suppress(BlockingIOError):
            while True:
                yield self._socket.recv(max_bytes)

    def close(self) -> None:
        """Stop listening; a socket that another process has put in this place meanwhile stays."""
        self._socket.close()
        with suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


class DatagramSender:
    """Whether or not anybody listens. May be called from any thread.

    Raises:
        ConfigError: the path is too long for a socket.
    """

    def __init__(self, path: Path) -> None:
        _check(path)
        self._path = os.fspath(path)
        self._socket = _socket()

    def send(self, datagram: bytes) -> bool:
        """False if it can't be delivered now: nobody listens, or what they have not read yet fills the socket. Never
        waits."""
        try:
            self._socket.sendto(datagram, self._path)
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.setblocking(False)
    return made


def _check(path: Path) -> None:
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"the path {path} is longer than a socket's {MAX_PATH_BYTES} bytes: choose a shorter --data-dir"
        )
