"""Wake-up hints between processes, over a unix datagram socket.

A ring says "look again", or carries a note that spares the look. It may be lost: nobody listens, the socket's buffer is
full (then rings wait there anyway, so many that the listener looks), the listener has just restarted. A lost one costs
a scan interval, never a request.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tinsmith.ipc.datagrams import DatagramListener, DatagramSender

PLAIN = b"\0"
MAX_NOTE_BYTES = 16 << 10
MAX_NOTES = 8  # fewer than Linux keeps for a listener (net.unix.max_dgram_qlen, 10): with more, some may be lost


class Bell:
    """Where one process listens. In an event loop: add `fileno()` as a reader, and call `wait(0)` to drain it.

    Raises:
        ConfigError: the path is too long for a socket.
    """

    def __init__(self, path: Path) -> None:
        self._listener = DatagramListener(path)
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)
        self._notes: list[bytes] = []
        self._is_plain = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._listener.fileno()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a ring at most that long. True if there was any since the last call; all of them are taken."""
        if not self._poll.poll(max(0.0, timeout_s) * 1000):
            return False
        for note in self._listener.received(MAX_NOTE_BYTES + 1):
            self._hear(note)
        return True

    def notes(self) -> Sequence[bytes] | None:
        """What rings carried since the last call; None: one carried nothing, or some may have been lost, so look."""
        heard, is_plain = self._notes, self._is_plain
        self._notes, self._is_plain = [], False
        return None if is_plain else heard

    def _hear(self, note: bytes) -> None:
        self._is_plain = self._is_plain or note == PLAIN or len(self._notes) == MAX_NOTES
        if self._is_plain:
            self._notes.clear()
        else:
            self._notes.append(note)

    def close(self) -> None:
        self._listener.close()


class Ringer:
    """Rings the bell at a path, whether or not anybody listens there. May be called from any thread.

    Raises:
        ConfigError: the path is too long for a socket.
    """

    def __init__(self, path: Path) -> None:
        self._sender = DatagramSender(path)

    def ring(self, note: bytes = PLAIN) -> None:
        """Never waits, and never raises for a listener that is away or busy. note: of `MAX_NOTE_BYTES` at most."""
        self._sender.send(note)

    def close(self) -> None:
        self._sender.close()
