"""The way to one client: what waits on it in either direction, and how it is closed. Knows no HTTP."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from contextlib import suppress


class Wire:
    """A transport, and under TLS the one `beneath` it, which holds what is encrypted already.

    Once it was closed twice, asyncio's TLS transport can't be asked anything (CPython 3.11 to 3.14); it holds nothing
    then that the one beneath it does not wait for.
    """

    def __init__(self, transport: asyncio.Transport, beneath: asyncio.Transport | None, ahead_bytes: int) -> None:
        """ahead_bytes: how much may be written ahead of the client, on each transport, before writers wait."""
        self._transport, self._lowest = transport, beneath or transport
        for each in {transport, self._lowest}:
            each.set_write_buffer_limits(high=ahead_bytes)

    def num_waiting(self) -> int:
        """Bytes that the kernel has not taken from us, since its client takes none from it."""
        num = self._lowest.get_write_buffer_size()
        if self._transport is not self._lowest and not self._transport.is_closing():
            num += self._transport.get_write_buffer_size()
        return num

    def num_unread(self) -> int:
        """Bytes that the client's machine has not taken: those that wait here, and those in the kernel."""
        return self.num_waiting() + self._in_kernel(termios.TIOCOUTQ)

    def num_unseen(self) -> int:
        """Bytes that came and were not read from the kernel."""
        return self._in_kernel(termios.FIONREAD)

    def cut(self) -> None:
        """Close it now; what waits is lost."""
        self._lowest.abort()

    def hang_up(self) -> None:
        """Close it once all is written. Under TLS asyncio would wait half a minute for the client's farewell, with a
        file open."""
        if not self._transport.is_closing():
            self._transport.close()
        if not self.num_waiting():
            self._lowest.abort()

    def _in_kernel(self, which: int) -> int:
        num = bytearray(struct.calcsize("i"))
        with suppress(OSError):
            fcntl.ioctl(self._lowest.get_extra_info("socket").fileno(), which, num)
        return int(struct.unpack("i", num)[0])
