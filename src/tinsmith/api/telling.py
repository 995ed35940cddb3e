"""Tells a client soon why its request is paused, though its poll could be held for much longer.

A poll is held for long, so that who waits costs little; but who is held back by a quota, or stands behind others, shall
see that within some seconds. So what polls wait for is looked at from time to time, for all polls of a run or of a
sampling client at once, and the hold of a poll ends early if there is news for it: that it is paused, or for another
cause than its client was told. What stays true: no client is told the same cause early twice, so nobody is made to
spin; looking takes a `SHARE`th of the time at most, however many wait, so where very many do they are told later.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from tinsmith.api.pauses import ACTIVE, Waiting
from tinsmith.store.end_rows import EndsAfter
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId

log = structlog.get_logger("tinsmith.api")

AFTER_S = 2.0  # of being held, a poll may be told
APART_S = 3.0  # two looks at the same line
LEAST_S = 0.5  # two goes
SHARE = 50
MAX_LINES = 32  # looked at in one go
MAX_LOOKED = 256  # polls of one line in one look; the others follow
MAX_TOLD = 12_000  # one for each connection

Look = Callable[[OpRow], Waiting]
Oldest = Callable[[], Sequence[OpRow]]


@dataclass(slots=True)
class _Line:
    """What is held for one run or sampler (ops), or the shared poll of one sampling client (oldest: its requests that
    have waited longest; blocks). due: monotonic."""

    due: float
    oldest: Oldest | None = None
    held: dict[asyncio.Future[Any], tuple[OpRow | None, float]] = field(default_factory=dict)


class Telling:
    """For the event loop's own thread, but for `_news`."""

    def __init__(self, look: Look) -> None:
        """look: why a request waits; blocks."""
        self._look = look
        self._lines: dict[object, _Line] = {}
        self._is_held = asyncio.Event()  # there are lines, so there is something to look at
        self._told: OrderedDict[OpId, str] = OrderedDict()
        self._named: OrderedDict[OpId, None] = OrderedDict()

    @contextmanager
    def of_poll(self, op: OpRow, future: asyncio.Future[Any]) -> Iterator[None]:
        """The poll of one request is held in this block; its future comes to False when there is news."""
        with self._in_line(op.run_id or op.sampler_id or op.id, None, op, future):
            yield

    @contextmanager
    def of_shared(self, mark: EndsAfter, clone: int, oldest: Oldest, future: asyncio.Future[Any]) -> Iterator[None]:
        """The same for one poll for all requests of a sampling client."""
        with self._in_line((mark.sampler_id, clone), oldest, None, future):
            yield

    def told(self, op_id: OpId, why: Waiting) -> None:
        """Its client is told so now."""
        _remember(self._told, op_id, _cause(why))

    def name(self, op_ids: Collection[OpId]) -> None:
        """A shared poll was told of these, so that each is asked for by itself now: by who wants to know why."""
        for op_id in op_ids:
            if op_id not in self._told:
                _remember(self._named, op_id, None)

    def is_asked_why(self, op_id: OpId) -> bool:
        """Whether it was named, and is asked for the first time since."""
        return self._named.pop(op_id, self) is not self

    @contextmanager
    def _in_line(
        self, key: object, oldest: Oldest | None, op: OpRow | None, future: asyncio.Future[Any]
    ) -> Iterator[None]:
        now = time.monotonic()
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(now + AFTER_S, oldest)
            self._is_held.set()
        line.held[future] = op, now
        try:
            yield
        finally:
            del line.held[future]
            if not line.held and self._lines.get(key) is line:
                del self._lines[key]
                if not self._lines:
                    self._is_held.clear()

    @asynccontextmanager
    async def watching(self, work: Callable[..., Any]) -> AsyncIterator[None]:
        """Look from time to time, on this event loop. work: runs what blocks in a thread."""
        task = asyncio.create_task(self._watch(work), name="telling")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self, work: Callable[..., Any]) -> None:
        rest_s = 0.0
        while True:
            await asyncio.sleep(rest_s)
            await self._is_held.wait()
            soonest = min(
                (line.due for line in self._lines.values()), default=0.0
            )  # none: it was held but for a moment
            await asyncio.sleep(max(LEAST_S, soonest - time.monotonic()))
            rest_s = 0.0
            now = time.monotonic()
            due = sorted((line for line in self._lines.values() if line.due <= now), key=lambda line: line.due)
            batch = [(line, self._waiting(line, now)) for line in due[:MAX_LINES]]
            if not batch:
                continue
            try:
                news, took_s = await work(self._news, batch)
            except Exception:  # part of the HTTP edge: polls say why at their end all the same
                log.exception("looking why requests wait failed; trying again")
                continue
            finally:
                for line, waiting in batch:
                    line.due = time.monotonic() + (LEAST_S if len(waiting) > MAX_LOOKED else APART_S)
            for future in news:
                if not future.done():
                    future.set_result(False)
            rest_s = SHARE * took_s

    def _waiting(self, line: _Line, now: float) -> list[tuple[asyncio.Future[Any], OpRow | None]]:
        """Its polls that have been held for long enough."""
        return [(future, op) for future, (op, since) in line.held.items() if now - since >= AFTER_S]

    def _news(
        self, batch: Sequence[tuple[_Line, list[tuple[asyncio.Future[Any], OpRow | None]]]]
    ) -> tuple[list[asyncio.Future[Any]], float]:
        """(those of which the client is to be told, seconds that it took). Blocks."""
        started = time.monotonic()
        news: list[asyncio.Future[Any]] = []
        for line, waiting in batch:
            if not waiting:
                continue
            if line.oldest is not None:
                if any(op.id not in self._named and self._is_news(op) for op in line.oldest()):
                    news += [future for future, _ in waiting]
                continue
            ops = [(future, op) for future, op in waiting if op is not None]
            ends = {cause for _, op in (ops[0], ops[-1]) if (cause := _cause(self._look(op)))}
            fresh = [(future, op) for future, op in ops if self._told.get(op.id) not in ends] if ends else []
            news += [future for future, op in fresh[:MAX_LOOKED] if self._is_news(op)]
        return news, time.monotonic() - started

    def _is_news(self, op: OpRow) -> bool:
        cause = _cause(self._look(op))
        return bool(cause) and self._told.get(op.id) != cause


def _cause(why: Waiting) -> str:
    """What makes two reasons the same, whatever their numbers; empty: it isn't paused."""
    return "" if why.state == ACTIVE else f"{why.state} {why.cause}"


def _remember(kept: OrderedDict[OpId, Any], op_id: OpId, what: Any) -> None:
    kept[op_id] = what
    kept.move_to_end(op_id)
    if len(kept) > MAX_TOLD:
        kept.popitem(last=False)
