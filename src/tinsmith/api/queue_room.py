"""Backpressure: how many more requests each tenant may queue, and how many bytes of them.

What is queued is counted only when the room that the last count left is used up, so that a request costs no counting
while the queue is short, and who finds none is told so from memory for a moment. Requests that have their room and are
not in the queue yet count as if they were.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tinsmith.config import Settings
from tinsmith.errors import CapacityError
from tinsmith.store.loads import Load
from tinsmith.types import TenantId

NOTHING = Load(0, 0)
FULL_S = 5e-6  # for each request that may wait: so long a full queue is taken to be full, a tenth of a second at most
MAX_FULL_S = 0.1


class QueueRoom:
    """May be called from any thread.

    Args:
        limit: of a tenant's requests that wait; the last one may reach beyond its bytes.
        count: tells what of a tenant waits; may block.
        refusal: what the client is told where there is no room.
    """

    def __init__(self, limit: Load, count: Callable[[TenantId], Load], refusal: str) -> None:
        self._limit, self._count, self._refusal = limit, count, refusal
        self._lock = threading.Lock()
        self._left: dict[TenantId, Load] = {}
        self._coming: dict[TenantId, Load] = {}
        self._full_until: dict[TenantId, float] = {}

    def take_known(self, tenant_id: TenantId, num_bytes: int = 0) -> bool:
        """Room for one more of what the last count left; `coming` must follow. False: `take` has to count. Never
        blocks."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._take(tenant_id, num_bytes)
        finally:
            self._lock.release()

    def refuse_known(self, tenant_id: TenantId) -> None:
        """Raises: CapacityError: there was no room a moment ago."""
        if self._full_until and time.monotonic() < self._full_until.get(tenant_id, 0.0):
            raise CapacityError(self._refusal)

    def take(self, tenant_id: TenantId, num_bytes: int = 0) -> None:
        """Room for one more; `coming` must follow.

        Raises:
            CapacityError: there is none.
        """
        with self._lock:
            if self._take(tenant_id, num_bytes):
                return
            queued, coming = self._count(tenant_id), self._coming.get(tenant_id, NOTHING)
            self._left[tenant_id] = self._limit.less(queued).less(coming)
            self._full_until.pop(tenant_id, None)
            if not self._take(tenant_id, num_bytes):
                self._full_until[tenant_id] = time.monotonic() + min(MAX_FULL_S, FULL_S * self._limit.requests)
                raise CapacityError(self._refusal)

    @contextmanager
    def coming(self, tenant_id: TenantId, num_bytes: int = 0) -> Iterator[None]:
        """Around what puts a request into the queue for which room was taken."""
        try:
            yield
        finally:
            with self._lock:
                left = self._coming.pop(tenant_id, NOTHING).less(Load(1, num_bytes))
                if left != NOTHING:
                    self._coming[tenant_id] = left

    def _take(self, tenant_id: TenantId, num_bytes: int) -> bool:
        left = self._left.get(tenant_id, NOTHING)
        if left.requests <= 0 or left.num_bytes <= 0:
            return False
        one = Load(1, num_bytes)
        self._left[tenant_id] = left.less(one)
        self._coming[tenant_id] = self._coming.get(tenant_id, NOTHING).plus(one)
        return True


def room_for_samples(settings: Settings, count: Callable[[TenantId], Load]) -> QueueRoom:
    most = settings.max_queued_samples
    refusal = (
        f"{most} sample requests of yours wait already, as many as may (--max-queued-samples): send this one again "
        "when some have ended, as the SDK does by itself"
    )
    return QueueRoom(Load(most, sys.maxsize), count, refusal)


def room_for_training(settings: Settings, count: Callable[[TenantId], Load]) -> QueueRoom:
    most = Load(settings.max_queued_training, settings.max_queued_training_mib * 2**20)
    refusal = (
        f"{most.requests} training requests of yours wait already, or {settings.max_queued_training_mib} MiB of them, "
        "as many as may (--max-queued-training, --max-queued-training-mib): send this one again when some have ended, "
        "as the SDK does by itself"
    )
    return QueueRoom(most, count, refusal)
