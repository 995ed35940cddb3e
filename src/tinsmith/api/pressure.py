"""Whether the API is asked for more than it can do, and whom it turns away then.

A queue that stands says so, not one that is long for a moment (as in CoDel: Nichols and Jacobson, "Controlling Queue
Delay", 2012): once the delay of the event loop, with the age of the oldest request that waits to be recorded, has not
been below `TARGET_S` for `INTERVAL_S`, and until it has been for `RELAX_S` (longer where many are refused), requests
that fill the queue are refused at the door, before their bodies are read or parsed: 429 and `Retry-After`. Those of
tenants who have few under way pass; fewer where enough of theirs waits in the queue, so that what is accepted is what
can be carried out. Polls, heartbeats and whatever gives results away are never refused. To refuse costs a twentieth of
what it takes to serve where many come together, and a fifth where each comes by itself.

Where requests come faster than they are carried out, and taking them in keeps a core from those who carry them out
(this thread stands ready for `CONTENDED` of the time and waits for one), tenants whose backlog is long already are
refused as well, but for as many as end meanwhile, until none was for `RELAX_S` or `STAY_S` have passed: taken in,
theirs would wait all the same, and make all others slower. While some are, the event loop dozes between short bursts,
as a thread that is woken for each request by itself takes twice the time for them.

How long who is refused is told to stay away is for `waits` to say, and whether he is read meanwhile for `hearing`. For
the event loop's own thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count, cycle

import structlog

from tinsmith.api.backlog import Backlog
from tinsmith.api.waits import Waits
from tinsmith.errors import CapacityError
from tinsmith.machine.contention import Contention
from tinsmith.types import TenantId

log = structlog.get_logger("tinsmith.api")

LOOK_S = 0.05
TARGET_S = 0.25
INTERVAL_S = 0.5
RELAX_S = 3.0
BUSY = 300  # refusals in that time, which say that letting all in would bring it back at once
STAY_S = 30.0  # and yet it is tried after so long
FEW = 256  # requests under way: some batches of `together`, which keep the disk and the processor busy
CONTENDED = 0.1
OVER = 20  # looks, over which that is measured
AWAKE_S, DOZE_S = 0.005, 0.025  # in turns
APART = 5  # looks, while the queue alone is what matters
CROWDED_S = (2, 3, 4)  # to wait, told in turn, where it is workers who can't keep up
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
        self,
        oldest_s: Callable[[], float],
        backlog: Backlog | None = None,
        contended: Callable[[], Callable[[], float]] = lambda: Contention().share,
    ) -> None:
        """`oldest_s`: how long the oldest request has waited to be recorded. `backlog`: of all tenants. `contended`:
        begins to measure what share of the time the event loop waits for a core."""
        self._oldest_s = oldest_s
        self._backlog = backlog
        self._contended = contended
        self._under_way: Counter[TenantId] = Counter()
        self._calm_at = self._pressed_at = self._high_at = time.monotonic()
        self._num_before = 0  # refused when it was looked last whether they are many
        self._waits, self._crowded_s = Waits(self._calm_at), cycle(CROWDED_S)
        self._share = 0.0
        self._crowded_until = self._contended_at = 0.0
        self._long_until = 0.0
        self.is_high = False
        self.num_refused = 0

    @property
    def is_crowded(self) -> bool:
        """Whether taking requests in keeps a core from those who carry them out."""
        return self._crowded_until > 0.0

    def refuses(self, tenant_id: TenantId) -> bool:
        """Whether there is too much of this tenant's now; it is counted as refused then."""
        if not (self.is_high or self.is_crowded):
            return False
        is_refused = (self.is_high and self._is_much(tenant_id)) or (self.is_crowded and self._is_long(tenant_id))
        self.num_refused += is_refused
        return is_refused

    def _is_much(self, tenant_id: TenantId) -> bool:
        under_way = self._under_way[tenant_id]
        has_enough = self._backlog is not None and self._backlog.has_enough(tenant_id)
        return under_way >= FEW or (under_way >= SINGLE and has_enough)

    def _is_long(self, tenant_id: TenantId) -> bool:
        if self._backlog is None or not self._backlog.is_long(tenant_id):
            return False
        self._long_until = time.monotonic() + RELAX_S
        self._crowded_until = max(self._crowded_until, min(self._long_until, self._contended_at + STAY_S))
        return True

    @contextmanager
    def under_way(self, tenant_id: TenantId) -> Iterator[None]:
        """Around a request that fills the queue.

        Raises:
            CapacityError: there is too much of this tenant's now.
        """
        if self.refuses(tenant_id):
            raise CapacityError(TOO_MUCH)
        self._under_way[tenant_id] += 1
        self._waits.let_in()
        try:
            yield
        finally:
            self._under_way[tenant_id] -= 1
            if self._backlog is not None and (self.is_high or self.is_crowded):
                self._backlog.came(tenant_id)
            if not self._under_way[tenant_id]:
                del self._under_way[tenant_id]

    def wait_s(self) -> int:
        """What to tell one more who is refused: whole seconds after which to come back."""
        return self._waits.told(time.monotonic()) if self.is_high else next(self._crowded_s)

    def note(self, delay_s: float, now: float) -> None:
        """So long it takes at the moment."""
        if delay_s < TARGET_S:
            self._calm_at = now
        else:
            self._pressed_at = now
        was_high = self.is_high
        if was_high:
            self._waits.look(now)
        self.is_high = not self._may_relax(now) if was_high else now - self._calm_at > INTERVAL_S
        if self.is_high != was_high:
            log.warning("overloaded" if self.is_high else "no longer overloaded", refused=self.num_refused)
            self.num_refused = self.num_refused if self.is_high else 0
            self._high_at, self._num_before = now, 0
            self._waits = Waits(now)
            self._forget()

    def note_contended(self, share: float, now: float) -> None:
        """Of the time since the last look, this thread stood ready for that share and waited for a core."""
        self._share += (share - self._share) / OVER
        if self._share > CONTENDED:
            self._contended_at = now
            self._crowded_until = max(self._crowded_until, now + INTERVAL_S)
        elif self.is_crowded and now > self._crowded_until:
            self._crowded_until = 0.0
            self._forget()

    def _forget(self) -> None:
        """What waits, once nobody keeps count of it."""
        if self._backlog is not None and not (self.is_high or self.is_crowded):
            self._backlog.clear()

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
        tasks = [
            asyncio.create_task(self._watch(), name="pressure"),
            asyncio.create_task(self._gather(), name="gather"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task

    async def _gather(self) -> None:
        """Where cores are short and what was accepted takes long, let what comes come together."""
        while True:
            is_long = self.is_crowded and time.monotonic() < self._long_until
            if is_long:
                _doze(DOZE_S)
            await asyncio.sleep(AWAKE_S if is_long else LOOK_S)

    async def _watch(self) -> None:
        contended = self._contended()
        for number in count():
            due = time.monotonic() + LOOK_S
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            self.note(now - due + self._oldest_s(), now)
            self.note_contended(contended(), now)
            is_due = self.is_high or (self.is_crowded and number % APART == 0)
            if is_due and self._backlog is not None:
                try:
                    await self._backlog.look()
                except Exception:  # part of the HTTP edge: what was counted before stands, and the state can still end
                    log.exception("counting what waits failed; trying again")


def _doze(seconds: float) -> None:
    """Nothing runs on the event loop meanwhile, on purpose."""
    time.sleep(seconds)
