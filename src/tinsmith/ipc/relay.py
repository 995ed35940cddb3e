"""Lines of several processes into one stream, without ever making a process wait.

A child that logs must not hang because a terminal is paused or nobody reads a pipe: lines are kept for a while, and
when there are too many the newest are dropped and counted.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable

MAX_LINES = 10_000


class Relay:
    def __init__(self, write: Callable[[str], None], max_lines: int = MAX_LINES) -> None:
        """`write` gets one line at a time, without its end, from one thread."""
        self._write = write
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._pump, name="relay", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Never blocks."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_dropped += 1

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is left, unless the stream takes longer than `timeout_s`."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _pump(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
                if self._num_dropped and self._lines.empty():
                    dropped, self._num_dropped = self._num_dropped, 0
                    self._write(f"({dropped} log lines were dropped: nobody was reading them)")
            except (OSError, ValueError):
                continue  # the reader has gone; the children go on


class RelayStream(io.TextIOBase):
    """A text stream over a relay, for this process's own log."""

    def __init__(self, relay: Relay, is_terminal: bool) -> None:
        super().__init__()
        self._relay = relay
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for line in text.splitlines():
            self._relay.put(line)
        return len(text)
