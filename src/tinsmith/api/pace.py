"""How fast the queues move: what an estimate of a wait is made of."""

from __future__ import annotations

import time

from tinsmith.store.places import Places
from tinsmith.types import TenantId

PACE_OVER_S = 30.0
PACE_TTL_S = 2.0


class Pace:
    """How many requests have ended lately; looked up every `PACE_TTL_S`, however many ask. For any thread."""

    def __init__(self) -> None:
        self._ended: dict[tuple[str, TenantId], int] = {}
        self._until = float("-inf")

    def seconds_for(self, num: int, places: Places, base: str, tenant_id: TenantId | None = None) -> float | None:
        """How long so many requests of a base take at the pace of the last `PACE_OVER_S`, of a tenant's own if it is
        named; None: none has ended."""
        if time.monotonic() > self._until:
            self._ended = places.ended_since(time.time() - PACE_OVER_S)
            self._until = time.monotonic() + PACE_TTL_S
        ended = sum(
            count for (of_base, of), count in self._ended.items() if of_base == base and tenant_id in (None, of)
        )
        return num * PACE_OVER_S / ended if ended else None
