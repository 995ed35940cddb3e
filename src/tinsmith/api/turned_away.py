"""When each tenant's training requests were last turned away for a lack of room, to be sent again.

Such a request leaves a gap in its run's numbers that isn't one: its client comes back with it. What stays true: nobody
was heard while this process wasn't there. For the event loop's own thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from tinsmith.types import TenantId

ON_RUNS = frozenset(
    f"/api/v1/{name}"
    for name in (
        "forward_backward", "optim_step", "save_weights", "save_weights_for_sampler", "save_weights_external",
        "load_weights",
    )
)  # fmt: skip
TO_RETRY = (429, 503)
MAX_TENANTS = 10_000  # remembered, those that were turned away last


class TurnedAway:
    def __init__(self) -> None:
        self._started = time.monotonic()
        self._at: OrderedDict[TenantId, float] = OrderedDict()

    def note(self, tenant_id: TenantId, path: str, status: int) -> None:
        """A request of the tenant's was answered so."""
        if status in TO_RETRY and path in ON_RUNS:
            self._at[tenant_id] = time.monotonic()
            self._at.move_to_end(tenant_id)
            if len(self._at) > MAX_TENANTS:
                self._at.popitem(last=False)

    def ago_s(self, tenant_id: TenantId) -> float:
        """How long ago that was the last time; inf: never."""
        return time.monotonic() - self._at.get(tenant_id, float("-inf"))

    def up_for_s(self) -> float:
        """How long this process has been there to be heard by."""
        return time.monotonic() - self._started
