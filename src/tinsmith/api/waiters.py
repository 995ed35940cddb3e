"""One watcher wakes every long poll.

Polls register the op they wait for, or the sampler whose next op to end they wait for. The watcher looks at all of
them at once, when the worker rings and every `scan_interval_s`: a lost ring costs a scan interval, never a result.
(Where thousands wait, it looks at what has ended lately, and at all of them every few intervals.) It hands on the rows
that it saw, which are final, and keeps none. A ring may bring the rows along, which were committed before; where few
are awaited, one that doesn't is answered by a look on the event loop itself, as long as such looks are brief.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeAlias

import structlog

from tinsmith.api.brief import Brief
from tinsmith.api.recent import Recent
from tinsmith.api.stay import STAY
from tinsmith.api.ticks import ticks_of
from tinsmith.errors import UserError
from tinsmith.ipc.bell import Bell
from tinsmith.ipc.notes import rows_in
from tinsmith.store.end_rows import EndsAfter
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId

log = structlog.get_logger("tinsmith.api")

Awaited: TypeAlias = OpId | EndsAfter
Ended: TypeAlias = OpRow | None  # what an op has come to; None for a sampler
EndedAmong = Callable[[Sequence[Awaited]], Awaitable[Mapping[Awaited, Ended]]]
EndedSince = Callable[[float], Awaitable[Sequence[OpId]]]  # seconds since the epoch
AtOnce = Callable[[Sequence[Awaited]], Mapping[Awaited, Ended]]
FEW = 8  # rows of at most `inline_bytes` each, read in half a millisecond
MANY = 256  # to look at each of 10,000 takes 15 ms
MARGIN_S = 0.25  # from a time that is recorded to its commit, mostly; what takes longer is found by the next scan
SCANNED = 1000  # of those that wait, in one interval
LONG_S = 2.0  # a hold that may last a tenth of a second longer


class Waiters:
    def __init__(self, bell: Bell | None, scan_interval_s: float) -> None:
        self._bell = bell
        self._scan_interval_s = scan_interval_s
        self._waiting: dict[Awaited, set[asyncio.Future[Ended | bool]]] = {}
        self._marks: set[EndsAfter] = set()  # of those that are awaited
        self._rung = asyncio.Event()
        self._recent = Recent()
        self._at_once: AtOnce | None = None
        self.brief = Brief()
        self._is_closed = False
        self.num_looks = 0  # that were begun

    @property
    def is_closed(self) -> bool:
        """The server stops: nothing can be waited for any more."""
        return self._is_closed

    @property
    def num_waiting(self) -> int:
        """From any thread."""
        return sum(map(len, list(self._waiting.values())))

    def expect(self, op_id: Awaited) -> asyncio.Future[Ended | bool]:
        """Register for an op's end, or a sampler's next one. Register first, then read: no end can slip between."""
        future: asyncio.Future[Ended | bool] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            future.set_result(False)
        else:
            self._waiting.setdefault(op_id, set()).add(future)
            if isinstance(op_id, EndsAfter):
                self._marks.add(op_id)
        return future

    def is_awaited(self, op_id: Awaited) -> bool:
        """Whether anybody waits for it now. From any thread."""
        return op_id in self._waiting

    def forget(self, op_id: Awaited, future: asyncio.Future[Ended | bool]) -> None:
        futures = self._waiting.get(op_id)
        if futures is not None:
            futures.discard(future)
            if not futures:
                del self._waiting[op_id]
                self._marks.discard(op_id)

    async def hold(self, future: asyncio.Future[Ended | bool], hold_s: float) -> bool:
        """Wait for a registered op. True once it is final, False after `hold_s` or at shutdown.

        Raises:
            UserError: the connection that asks for it was closed.
        """
        loop = asyncio.get_running_loop()
        give_up = partial(_give_up, future)
        timer = ticks_of(loop).later(hold_s, give_up) if hold_s > LONG_S else loop.call_later(hold_s, give_up)
        stay = STAY.get()
        if stay is not None:
            stay.add(future)
        try:
            has_ended = await future is not False
        finally:
            timer.cancel()
            if stay is not None:
                stay.discard(future)
        if stay is not None and stay.is_over:
            raise UserError("the connection was closed before the answer was there")
        return has_ended

    def outcome(self, future: asyncio.Future[Ended | bool]) -> OpRow | None:
        """What a registered op has come to, as the watcher saw it; None: not yet, as far as that knows."""
        ended = future.result() if future.done() else None
        return ended if isinstance(ended, OpRow) else None

    def ring(self) -> None:
        """Look now. For the event loop's own thread."""
        self._rung.set()

    def close(self) -> None:
        """End every poll at once, and each that comes later."""
        self._is_closed = True
        for futures in self._waiting.values():
            for future in futures:
                if not future.done():
                    future.set_result(False)
        self._waiting.clear()
        self._marks.clear()

    @asynccontextmanager
    async def watching(
        self,
        ended_among: EndedAmong,
        recent: Recent | None = None,
        at_once: AtOnce | None = None,
        ended_since: EndedSince | None = None,
    ) -> AsyncIterator[None]:
        """Run the watcher on this event loop. When it is rung, it looks for the end of `recent` requests too.
        `at_once` looks as `ended_among` does, and blocks meanwhile; either is timed by `brief`. `ended_since` names
        what has ended, for looks that shall not cost more the more is awaited."""
        loop = asyncio.get_running_loop()
        self._recent, self._at_once = recent or Recent(), at_once
        if self._bell is not None:
            loop.add_reader(self._bell.fileno(), self._on_bell, self._bell)
        task = asyncio.create_task(self._watch(ended_among, ended_since), name="waiters")
        try:
            yield
        finally:
            self.close()
            if self._bell is not None:
                loop.remove_reader(self._bell.fileno())
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _on_bell(self, bell: Bell) -> None:
        bell.wait(0.0)
        told = rows_in(bell.notes())
        if told is not None:
            self.num_looks += 1
            self._hand_on({row.id: row for row in told})
        elif not self._is_seen_at_once():
            self._rung.set()

    def _is_seen_at_once(self) -> bool:
        if self._at_once is None or len(self._waiting) > FEW or not self.brief.is_now:
            return False
        awaited = self._awaited(self._recent.open_ids())
        if len(awaited) > FEW:
            return False
        if awaited:
            self.num_looks += 1
            try:
                ended = self._at_once(awaited)
            except Exception:  # the watcher looks again, and says what is wrong
                return False
            self._hand_on(ended)
        return True

    async def _watch(self, ended_among: EndedAmong, ended_since: EndedSince | None) -> None:
        looked_at, scanned_at = time.time(), float("-inf")
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._scan_interval_s):  # wait_for may swallow a cancellation (bpo-37658)
                    await self._rung.wait()
            recent = self._recent.open_ids() if self._rung.is_set() else ()
            self._rung.clear()
            since, looked_at = looked_at - MARGIN_S, time.time()
            rest_s = self._scan_interval_s * max(1.0, len(self._waiting) / SCANNED)
            is_scan = time.monotonic() - scanned_at > rest_s
            try:
                if ended_since is not None and len(self._waiting) > MANY and not is_scan:
                    lately = [op_id for op_id in await ended_since(since) if op_id in self._waiting]
                    awaited: list[Awaited] = [*self._marks, *lately, *recent]
                else:
                    scanned_at = time.monotonic()
                    awaited = self._awaited(recent)
                if not awaited:
                    continue
                self.num_looks += 1
                ended = await ended_among(awaited)
            except Exception:  # part of the HTTP edge: one failed look must not end all later wake-ups
                log.exception("looking for finished requests failed; trying again")
                continue
            self._hand_on(ended)

    def _awaited(self, recent: Sequence[OpId]) -> list[Awaited]:
        return [*self._waiting, *(op_id for op_id in recent if op_id not in self._waiting)]

    def _hand_on(self, ended: Mapping[Awaited, Ended]) -> None:
        for awaited, outcome in ended.items():
            if isinstance(outcome, OpRow) and awaited not in self._waiting:
                self._recent.ended(outcome)
            self._marks.discard(awaited)
            for future in self._waiting.pop(awaited, ()):
                if not future.done():
                    future.set_result(outcome)


def _give_up(future: asyncio.Future[Ended | bool]) -> None:
    if not future.done():
        future.set_result(False)
