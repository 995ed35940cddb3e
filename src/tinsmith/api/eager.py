"""A coroutine that begins at once: what needs to wait for nothing costs no task and no turn of the event loop.

Where it does wait, the rest of it is a task. Until then it isn't in one, so it may use no `asyncio.timeout`. From
Python 3.12 on `asyncio.Task(..., eager_start=True)` does the same, and this can go.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from contextvars import copy_context
from typing import Any


def begin(coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None] | None:
    """Run it up to where it waits; the task that goes on from there, or None if it has ended.

    It has its own copy of the context from its first step on. What it raises before it waits is raised here.
    """
    context = copy_context()
    try:
        waits_for = context.run(coroutine.send, None)
    except StopIteration:
        return None
    return loop.create_task(_rest(coroutine, waits_for), context=context)


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """Goes on with a coroutine that was begun, in place of the task: hands on what either says to the other."""
    try:
        while True:
            if waits_for is not None:
                waits_for._asyncio_future_blocking = True  # as when it was awaited
            try:
                yield waits_for
            except BaseException as error:
                waits_for = coroutine.throw(error)
            else:
                waits_for = coroutine.send(None)
    except StopIteration:
        return
