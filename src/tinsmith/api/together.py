"""Calls that come while others are under way are carried out together, in one go of a thread.

A write that waits for the disk, or a hop to a thread and back, costs the same for one call as for sixty. Nothing waits
for others to come: the first call starts at once, and those that come meanwhile are the next batch. Each tenant has its
turn in every batch, so that who calls a thousand times at once stands beside another and not before him.

A call that comes alone is carried out on the event loop itself, as long as such calls are brief and have to wait for
nobody: two hops between threads cost as much as a short write to a good disk. While calls come alone, the next one is
taken to do so too, and begins at once. Reads cost so little that a few are carried out there as well (`few`).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from tinsmith.api.brief import Brief
from tinsmith.errors import TakenError
from tinsmith.types import TenantId

T = TypeVar("T")
R = TypeVar("R")
Outcomes: TypeAlias = "Sequence[R | Exception]"
AT_MOST = 64  # calls in one batch


class Together(Generic[T, R]):
    """For the event loop's own thread."""

    def __init__(
        self,
        executor: Executor,
        carry_out: Callable[[Sequence[T]], Outcomes[R]],
        at_once: Callable[[T], R] | None = None,
        few: int = 1,
    ) -> None:
        """`carry_out` runs on the executor: one outcome for each call, in their order; an exception is for its call
        alone. What it raises itself is for all of them. `at_once` does the same for one call, on the event loop, where
        that waits for nobody, and raises TakenError where it would. few: so many calls at most go that way together.
        """
        self._executor = executor
        self._carry_out = carry_out
        self._at_once = at_once
        self._few = few
        self._brief = Brief()
        self._waiting: OrderedDict[TenantId, deque[tuple[T, asyncio.Future[R], float]]] = OrderedDict()
        self._is_under_way = False
        self._is_quiet = False  # the last call came alone, and its turn of the loop is over

    async def ask(self, tenant_id: TenantId, call: T) -> R:
        """The outcome of one call of a tenant's."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        if self._is_quiet and self._is_done_at_once(call, future):
            self._is_quiet = False
            loop.call_soon(self._look_around)
            return future.result()
        self._waiting.setdefault(tenant_id, deque()).append((call, future, time.monotonic()))
        self._is_quiet = False
        if not self._is_under_way:
            self._is_under_way = True
            loop.call_soon(self._start, loop)  # with all that is asked for in this turn of the loop
        return await future

    @property
    def oldest_s(self) -> float:
        """How long the oldest call has waited; 0 if none waits."""
        return max((time.monotonic() - line[0][2] for line in self._waiting.values()), default=0.0)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._take()
        if not batch:
            self._is_under_way = False
            return
        if len(batch) <= self._few:
            is_alone = len(batch) == 1
            batch = [(call, future) for call, future in batch if not self._is_done_at_once(call, future)]
            if not batch:
                self._is_under_way = False
                self._is_quiet = is_alone
                return
        calls = [call for call, _ in batch]
        running = loop.run_in_executor(self._executor, self._brief.timed, partial(self._carry_out, calls))
        running.add_done_callback(lambda ended: self._end(loop, batch, ended))

    def _look_around(self) -> None:
        """A turn of the loop after a call that was carried out at once: did others come in it?"""
        self._is_quiet = not self._is_under_way

    def _is_done_at_once(self, call: T, future: asyncio.Future[R]) -> bool:
        if self._at_once is None or not self._brief.is_now:
            return False
        try:
            future.set_result(self._brief.timed(partial(self._at_once, call)))
        except TakenError:
            return False
        except Exception as error:
            future.set_exception(error)
        return True

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        """The next batch: one call a tenant, again and again. Those that nobody waits for any more are left out."""
        batch: list[tuple[T, asyncio.Future[R]]] = []
        while self._waiting and len(batch) < AT_MOST:
            tenant_id, line = self._waiting.popitem(last=False)
            call, future, _ = line.popleft()
            if line:
                self._waiting[tenant_id] = line
            if not future.done():
                batch.append((call, future))
        return batch

    def _end(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: Sequence[tuple[T, asyncio.Future[R]]],
        ended: asyncio.Future[Outcomes[R]],
    ) -> None:
        failure = asyncio.CancelledError() if ended.cancelled() else ended.exception()
        outcomes: Sequence[R | BaseException] = [failure] * len(batch) if failure is not None else ended.result()
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if future.done():
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        self._start(loop)
