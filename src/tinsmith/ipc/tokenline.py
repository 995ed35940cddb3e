"""The line on which a worker tells the API of samples under way, over a unix datagram socket beside the API's bell.

What is said here is a foretaste: the recorded result is the truth and comes by way of the store. So a line may be away
or full; the sender learns of that at once, never waits, and says the same again later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tinsmith.ipc.datagrams import DatagramListener, DatagramSender

MAX_BYTES = 1 << 16


def line_path(bell: Path) -> Path:
    """Where the process that listens at this bell listens for samples."""
    return bell.with_suffix(".line")


class TokenLine(DatagramListener):
    """The listening end."""

    def heard(self) -> Iterator[bytes]:
        """All datagrams that wait."""
        return self.received(MAX_BYTES)


class TokenSender(DatagramSender):
    """The speaking end."""
