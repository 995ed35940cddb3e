"""Backpressure: how many more sample requests each tenant may queue.

What is queued is counted only when the room that the last count left is used up, so that a request costs no counting
while the queue is short. Requests that have their room and are not in the queue yet count as if they were.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tinsmith.errors import CapacityError
from tinsmith.types import TenantId


class QueueRoom:
    """May be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: Counter[TenantId] = Counter()
        self._coming: Counter[TenantId] = Counter()

    def take(self, tenant_id: TenantId, count: Callable[[TenantId], int], limit: int) -> None:
        """Room for one more in a queue of at most `limit`, where `count` tells how many are; `coming` must follow.

        Raises:
            CapacityError: there is none.
        """
        with self._lock:
            if self._left[tenant_id] <= 0:
                self._left[tenant_id] = limit - count(tenant_id) - self._coming[tenant_id]
            if self._left[tenant_id] <= 0:
                raise CapacityError(
                    f"{limit} sample requests of yours wait already, as many as may (--max-queued-samples): send this "
                    "one again when some have ended, as the SDK does by itself"
                )
            self._left[tenant_id] -= 1
            self._coming[tenant_id] += 1

    @contextmanager
    def coming(self, tenant_id: TenantId) -> Iterator[None]:
        """Around what puts a request into the queue for which room was taken."""
        try:
            yield
        finally:
            with self._lock:
                self._coming[tenant_id] -= 1
