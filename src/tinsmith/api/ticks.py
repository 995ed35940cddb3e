"""Times that need not be exact: all that fall due within `GRID_S` come due together, on one timer of the event loop.

Each answer begins a wait for the next request, and each poll one for the end of its hold; nearly all of them are called
off again. On the loop's own heap of timers each costs some ten comparisons and a turn of the loop, here a place in a
set. And polls that end together are asked again together, which costs a turn of the loop for all. For the event loop's
own thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import ceil
from weakref import WeakKeyDictionary

GRID_S = 0.1


class Tick:
    """Something that is due at a time, unless it is cancelled before. Stands for a TimerHandle."""

    __slots__ = ("_call", "_due")

    def __init__(self, due: set[Tick], call: Callable[[], None]) -> None:
        self._due = due
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None
        self._due.discard(self)

    def run(self) -> None:
        if self._call is not None:
            self._call()


class Ticks:
    """Of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._time, self._call_at, self._call_soon = loop.time, loop.call_at, loop.call_soon
        self._due: dict[int, set[Tick]] = {}

    def later(self, seconds: float, call: Callable[[], None]) -> Tick:
        """`call` after so many seconds, and up to `GRID_S` more."""
        number = ceil((self._time() + seconds) / GRID_S)
        due = self._due.get(number)
        if due is None:
            due = self._due[number] = set()
            self._call_at(number * GRID_S, self._fall_due, number)
        tick = Tick(due, call)
        due.add(tick)
        return tick

    def _fall_due(self, number: int) -> None:
        for tick in self._due.pop(number):
            self._call_soon(tick.run)


_OF_LOOPS: WeakKeyDictionary[asyncio.AbstractEventLoop, Ticks] = WeakKeyDictionary()


def ticks_of(loop: asyncio.AbstractEventLoop) -> Ticks:
    """The loop's own."""
    ticks = _OF_LOOPS.get(loop)
    if ticks is None:
        ticks = _OF_LOOPS[loop] = Ticks(loop)
    return ticks
