"""A child's signs of life, over a pipe: one byte a second, which says whether it only starts or serves already, and
while it reads a model's weights, how many of a hundred parts it has.

The child beats from where it would hang (the event loop, a thread beside a computing loop), so that silence means that
it does. Neither side ever waits: a full pipe says the same as one more byte.
"""

from __future__ import annotations

import os
from contextlib import suppress

BEAT_S = 1.0
STARTING = b"."
SERVING = b"!"
READ_BYTES = 65536
_NONE_READ = 128  # and up to a hundred more


def reading(share: float) -> bytes:
    """The sign of a child that starts, and has read this share of its weights."""
    return bytes([_NONE_READ + int(100 * min(1.0, max(0.0, share)))])


def percent_read(signs: bytes) -> int | None:
    """What the last of these signs says of reading; None if it says nothing."""
    return signs[-1] - _NONE_READ if signs and signs[-1] >= _NONE_READ else None


class Pulse:
    """The child's end."""

    def __init__(self, fd: int | None) -> None:
        """fd None: nobody listens."""
        self._fd = fd

    def beat(self, sign: bytes = SERVING) -> None:
        if self._fd is not None:
            with suppress(BlockingIOError, BrokenPipeError):
                os.write(self._fd, sign)


class Stethoscope:
    """The parent's end. `inherited_fd` is for the child, and is closed here once that has it (`given`)."""

    def __init__(self) -> None:
        self._fd, self.inherited_fd = os.pipe()
        os.set_blocking(self._fd, False)
        os.set_blocking(self.inherited_fd, False)

    def given(self) -> None:
        os.close(self.inherited_fd)

    def hear(self) -> bytes:
        """All signs since the last call; nothing after the end of the child."""
        if self._fd < 0:
            return b""
        try:
            return os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
