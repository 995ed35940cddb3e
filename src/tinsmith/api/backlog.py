"""What of each tenant waits to be carried out, and how fast that goes: as it was a moment ago, and what came since.

It is looked up only while there is reason to. For the event loop's own thread.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from tinsmith.types import TenantId

ENOUGH = 1024  # requests: some batches of the worker
LONG_S = 5.0  # longer than anybody who was refused stays away
PACE_OVER_S = 5.0
PACE_TTL_S = 1.0
REST = 20  # times as long as a look took, until the next one
LEAST_PACE = 4.0  # a second: among what was refused may be what all the others wait for

Count = Callable[[], Awaitable[Mapping[TenantId, int]]]
EndedSince = Callable[[float], Awaitable[Mapping[TenantId, int]]]


class Backlog:
    def __init__(self, count: Count, ended_since: EndedSince) -> None:
        """count: how many of each tenant's wait for a worker alone. ended_since: how many have ended since then, unix
        seconds."""
        self._count = count
        self._ended_since = ended_since
        self._waiting: Counter[TenantId] = Counter()
        self._ended: Mapping[TenantId, int] = {}
        self._spare: Counter[TenantId] = Counter()  # that may come, though it is long
        self._looked_at = time.monotonic()
        self._next_at = 0.0
        self._pace_until = 0.0

    def came(self, tenant_id: TenantId) -> None:
        """One more."""
        self._waiting[tenant_id] += 1
        self._spare[tenant_id] -= 1

    def has_enough(self, tenant_id: TenantId) -> bool:
        """Whether the worker won't run out of this tenant's for a while. Looks are far apart where they take long, so
        what has ended since the last one is reckoned from the pace."""
        if self._waiting[tenant_id] < ENOUGH:
            return False
        since_s = time.monotonic() - self._looked_at
        return self._waiting[tenant_id] - self._ended.get(tenant_id, 0) / PACE_OVER_S * since_s >= ENOUGH

    def is_long(self, tenant_id: TenantId) -> bool:
        """Whether it has enough, which takes longer than `LONG_S` at the pace of what of it ended of late, and as much
        came since the last look as ends in that time. If nothing of it ends at all, it is not for want of a core."""
        num_ended = self._ended.get(tenant_id, 0)
        if not num_ended or not self.has_enough(tenant_id):
            return False
        return self._waiting[tenant_id] > num_ended * LONG_S / PACE_OVER_S and self._spare[tenant_id] <= 0

    async def look(self) -> None:
        """Count anew, unless that takes so long that it is too soon."""
        now = time.monotonic()
        if now < self._next_at:
            return
        if now > self._pace_until:
            self._ended = await self._ended_since(time.time() - PACE_OVER_S)
            self._pace_until = now + PACE_TTL_S
        self._waiting = Counter(await self._count())
        since_s, self._looked_at = min(1.0, now - self._looked_at), now
        paces = {tenant_id: self._ended.get(tenant_id, 0) / PACE_OVER_S for tenant_id in self._waiting}
        self._spare = Counter({of: math.ceil(max(LEAST_PACE, pace) * since_s) for of, pace in paces.items()})
        self._next_at = time.monotonic() + REST * (time.monotonic() - now)

    def clear(self) -> None:
        self._waiting.clear()
        self._spare.clear()
