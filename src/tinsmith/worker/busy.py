"""How long the engine has been at work: what is left of the time, it waited for requests or for us."""

from __future__ import annotations

import time
from types import TracebackType


class Busy:
    """Entered by the loop around each piece of computing; may be read from any thread."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
        self._since = None

    @property
    def seconds(self) -> float:
        """Of computing until now, with that of the piece under way."""
        since = self._since
        return self._seconds + (0.0 if since is None else time.monotonic() - since)
