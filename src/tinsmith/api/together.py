"""Calls that come while others are under way are carried out together, in one go of a thread.

A write that waits for the disk, or a hop to a thread and back, costs the same for one call as for sixty. Nothing waits
for others to come: the first call starts at once, and those that come meanwhile are the next batch. Each tenant has its
turn in every batch, so that who calls a thousand times at once stands beside another and not before him.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeAlias, TypeVar

from tinsmith.types import TenantId

T = TypeVar("T")
R = TypeVar("R")
Outcomes: TypeAlias = "Sequence[R | Exception]"
AT_MOST = 64  # calls in one batch


class Together(Generic[T, R]):
    """For the event loop's own thread."""

    def __init__(self, executor: Executor, carry_out: Callable[[Sequence[T]], Outcomes[R]]) -> None:
        """`carry_out` runs on the executor: one outcome for each call, in their order; an exception is for its call
        alone. What it raises itself is for all of them."""
        self._executor = executor
        self._carry_out = carry_out
        self._waiting: OrderedDict[TenantId, deque[tuple[T, asyncio.Future[R]]]] = OrderedDict()
        self._is_under_way = False

    async def ask(self, tenant_id: TenantId, call: T) -> R:
        """The outcome of one call of a tenant's."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.setdefault(tenant_id, deque()).append((call, future))
        if not self._is_under_way:
            self._is_under_way = True
            loop.call_soon(self._start, loop)  # with all that is asked for in this turn of the loop
        return await future

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._take()
        if not batch:
            self._is_under_way = False
            return
        running = loop.run_in_executor(self._executor, self._carry_out, [call for call, _ in batch])
        running.add_done_callback(lambda ended: self._end(loop, batch, ended))

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        """The next batch: one call a tenant, again and again. Those that nobody waits for any more are left out."""
        batch: list[tuple[T, asyncio.Future[R]]] = []
        while self._waiting and len(batch) < AT_MOST:
            tenant_id, line = self._waiting.popitem(last=False)
            call, future = line.popleft()
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
