"""Whether the API is asked for more than it can do, and whom it turns away then.

A queue that stands says so, not one that is long for a moment (as in CoDel: Nichols and Jacobson, "Controlling Queue
Delay", 2012): once the delay of the event loop, with the age of the oldest request that waits to be recorded, has not
been below `TARGET_S` for `INTERVAL_S`, and until it has been for `RELAX_S` (longer where many are refused), requests
that fill the queue are refused at the door, before their bodies are read or parsed: 429 and `Retry-After`. Those of
tenants who have few under way pass; fewer where enough of theirs waits in the queue, so that what is accepted is what
can be carried out. Polls, heartbeats and whatever gives results away are never refused. To refuse costs a twentieth of
what it takes to serve. A connection that was refused, and asks again before it was told to, isn't read for `DEAF_S`:
what its client sends meanwhile waits on the client's side. For the event loop's own thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import cycle

import structlog

from tinsmith.errors import CapacityError
from tinsmith.types import TenantId

log = structlog.get_logger("tinsmith.api")

LOOK_S = 0.05
TARGET_S = 0.25
INTERVAL_S = 0.5
RELAX_S = 3.0
BUSY = 300  # refusals in that time, which say that letting all in would bring it back at once
STAY_S = 30.0  # and yet it is tried after so long
DEAF_S = 1.0
FEW = 256  # requests under way: some batches of `together`, which keep the disk and the processor busy
ENOUGH = 1024  # in the queue: some batches of the worker
WAITS_S = (1, 2, 3)  # told in turn to those who are refused, so that they don't come back together
SINGLE = 16  # under way at once: who sends no more than these adds little, however much of his waits
TOO_MUCH = "the server is asked for more than it can do at the moment: send the request again"
FILLING = frozenset(
    f"/api/v1/{name}"
    for name in (
        "create_model", "forward", "forward_backward", "optim_step", "asample", "save_weights", "load_weights",
        "save_weights_for_sampler", "save_weights_external", "create_custom_loss", "copy_weights",
        "import_weights",
    )
)  # fmt: skip
COMPATIBLE = frozenset({"/oai/api/v1/chat/completions", "/oai/api/v1/completions", "/anthropic/api/v1/messages"})


class Pressure:
    def __init__(
        self, oldest_s: Callable[[], float], count_queued: Callable[[TenantId], Awaitable[int]] | None = None
    ) -> None:
        """`oldest_s`: how long the oldest request has waited to be recorded. `count_queued`: how many of a tenant's
        wait to be carried out; looked up while there is too much."""
        self._oldest_s = oldest_s
        self._count_queued = count_queued
        self._under_way: Counter[TenantId] = Counter()
        self._queued: Counter[TenantId] = Counter()  # as they were counted last, and those that came since
        self._calm_at = self._pressed_at = self._high_at = time.monotonic()
        self._num_before = 0  # refused when it was looked last whether they are many
        self._waits_s = cycle(WAITS_S)
        self.is_high = False
        self.num_refused = 0

    def refuses(self, tenant_id: TenantId) -> bool:
        """Whether there is too much of this tenant's now; it is counted as refused then."""
        under_way = self._under_way[tenant_id]
        has_enough = under_way >= SINGLE and self._queued[tenant_id] >= ENOUGH
        is_refused = self.is_high and (under_way >= FEW or has_enough)
        self.num_refused += is_refused
        return is_refused

    @contextmanager
    def under_way(self, tenant_id: TenantId) -> Iterator[None]:
        """Around a request that fills the queue.

        Raises:
            CapacityError: there is too much of this tenant's now.
        """
        if self.refuses(tenant_id):
            raise CapacityError(TOO_MUCH)
        self._under_way[tenant_id] += 1
        try:
            yield
        finally:
            self._under_way[tenant_id] -= 1
            if self.is_high and self._count_queued is not None:
                self._queued[tenant_id] += 1
            if not self._under_way[tenant_id]:
                del self._under_way[tenant_id]

    def wait_s(self) -> int:
        """What to tell one more who is refused: whole seconds after which to come back."""
        return next(self._waits_s)

    def note(self, delay_s: float, now: float) -> None:
        """So long it takes at the moment."""
        if delay_s < TARGET_S:
            self._calm_at = now
        else:
            self._pressed_at = now
        was_high = self.is_high
        self.is_high = not self._may_relax(now) if was_high else now - self._calm_at > INTERVAL_S
        if self.is_high != was_high:
            log.warning("overloaded" if self.is_high else "no longer overloaded", refused=self.num_refused)
            self.num_refused = self.num_refused if self.is_high else 0
            self._high_at, self._num_before = now, 0
            self._queued.clear()

    def _may_relax(self, now: float) -> bool:
        if now - self._pressed_at < RELAX_S:
            return False
        num, self._num_before = self.num_refused - self._num_before, self.num_refused
        if num < BUSY or now - self._high_at > STAY_S:
            return True
        self._pressed_at = now
        return False

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look from time to time."""
        task = asyncio.create_task(self._watch(), name="pressure")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + LOOK_S
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            self.note(now - due + self._oldest_s(), now)
            if self.is_high and self._count_queued is not None:
                for tenant_id in self._under_way.keys() | self._queued.keys():
                    self._queued[tenant_id] = await self._count_queued(tenant_id)
