"""Backpressure: how many more sample requests each tenant may queue.

What is queued is counted only when the room that the last count left is used up, so that a request costs no counting
while the queue is short. The bound is exact but for requests that arrive in the very moment of a count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from tinsmith.errors import CapacityError


class QueueRoom:
    """May be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[Hashable, int] = {}

    def take(self, queue: Hashable, count: Callable[[], int], limit: int) -> None:
        """Room for one more in a queue of at most `limit`; `count` tells how many are in it.

        Raises:
            CapacityError: there is none.
        """
        with self._lock:
            left = self._left.get(queue, 0)
            if left <= 0:
                left = limit - count()
            if left <= 0:
                raise CapacityError(
                    f"{limit} sample requests of yours wait already, as many as may (--max-queued-samples): send this "
                    "one again when some have ended, as the SDK does by itself"
                )
            self._left[queue] = left - 1
