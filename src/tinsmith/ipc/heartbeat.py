"""The parent's sign of life, which any number of children read: when its deciding loop last went round.

A file of eight bytes without a name, which the children inherit. The clock is the system's monotonic one, which all
processes share and which stands still while the machine sleeps. Reading waits for nobody.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time

_MOMENT = struct.Struct("=d")  # monotonic seconds


class Heart:
    """The parent's end. `inherited_fd` is for the children."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self.inherited_fd = os.dup(file.fileno())
        self.beat()

    def beat(self) -> None:
        os.pwrite(self.inherited_fd, _MOMENT.pack(time.monotonic()), 0)

    def close(self) -> None:
        os.close(self.inherited_fd)


class Ear:
    """A child's end. patience_s: a parent that is silent for longer hangs, or was stopped."""

    def __init__(self, fd: int | None, patience_s: float) -> None:
        """fd None: there is no parent that beats."""
        self._fd = fd
        self._patience_s = patience_s

    @property
    def silent_s(self) -> float | None:
        """Seconds since the parent's last sign of life; None without such a parent."""
        if self._fd is None:
            return None
        (moment,) = _MOMENT.unpack(os.pread(self._fd, _MOMENT.size, 0))
        return max(0.0, time.monotonic() - float(moment))

    @property
    def trouble(self) -> str | None:
        """What is wrong with the parent, in words; None: nothing."""
        silent_s = self.silent_s
        if silent_s is None or silent_s <= self._patience_s:
            return None
        return (
            f"the supervisor (tinsmith serve) has given no sign of life for {silent_s:.0f} s: it hangs or was stopped, "
            "and no process that dies now is started again"
        )
