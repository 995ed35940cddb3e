"""The line on which a worker tells the API of samples under way, over a unix datagram socket beside the API's bell.

What is said here is a foretaste: the recorded result is the truth and comes by way of the store. So a line may be away
or full; the sender learns of that at once, never waits, and says the same again later.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tinsmith.ipc.bell import check_path

MAX_BYTES = 1 << 16


def line_path(bell: Path) -> Path:
    """Where the process that listens at this bell listens for samples."""
    return bell.with_suffix(".line")


class TokenLine:
    """The listening end. In an event loop: add `fileno()` as a reader, and call `heard` to drain it.

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

    def fileno(self) -> int:
        return self._socket.fileno()

    def heard(self) -> Iterator[bytes]:
        """All datagrams that wait."""
        with suppress(BlockingIOError):
            while True:
                yield self._socket.recv(MAX_BYTES)

    def close(self) -> None:
        """Stop listening; a line that another process has put in this place meanwhile stays."""
        self._socket.close()
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()


class TokenSender:
    """The speaking end, whether or not anybody listens. For one thread.

    Raises:
        ConfigError: the path is too long for a socket.
    """

    def __init__(self, path: Path) -> None:
        check_path(path)
        self._path = os.fspath(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, datagram: bytes) -> bool:
        """False if it could not be delivered now: nobody listens, or what they have not read yet fills the socket."""
        try:
            self._socket.sendto(datagram, self._path)
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()
