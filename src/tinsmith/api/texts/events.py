"""Server-sent events. What fails before the first event is an ordinary error; after it the stream ends with one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import structlog
from litestar.response import Stream

from tinsmith.api.auth import Call
from tinsmith.api.texts.asking import Event
from tinsmith.api.texts.leaving import unless_gone
from tinsmith.errors import TinsmithError
from tinsmith.wire.media import encode_json

log = structlog.get_logger("tinsmith.api")

MEDIA_TYPE = "text/event-stream; charset=utf-8"
HEADERS: Mapping[str, str] = {"cache-control": "no-cache", "x-accel-buffering": "no"}
ALIVE = b": waiting\n\n"
INTERNAL = "internal error; the server's log has the details"


def frame(data: Any, event: str | None = None) -> bytes:
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + encode_json(data) + b"\n\n"


async def open_stream(
    request: Call, frames: AsyncGenerator[bytes, None], failed: Callable[[TinsmithError], bytes]
) -> Stream:
    """An answer that is sent as it comes; `frames` are closed when the client goes.

    Raises:
        TinsmithError: what `frames` raises before its first frame.
    """
    first = await unless_gone(request, anext(frames))
    return Stream(_body(first, frames, failed), media_type=MEDIA_TYPE, headers=dict(HEADERS))


async def merge(sources: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all sources as they come, each with the number of its source."""
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue()

    async def drain(number: int, source: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(source):
                async for event in source:
                    queue.put_nowait((number, event))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(drain(number, source)) for number, source in enumerate(sources)]
    num_open = len(tasks)
    try:
        while num_open:
            number, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                num_open -= 1
            else:
                yield number, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(
    first: bytes, frames: AsyncGenerator[bytes, None], failed: Callable[[TinsmithError], bytes]
) -> AsyncIterator[bytes]:
    async with aclosing(frames):
        yield first
        try:
            async for each in frames:
                yield each
        except TinsmithError as error:
            yield failed(error)
        except Exception:  # part of the HTTP edge: a stream that has begun can't become an answer 500
            log.exception("a stream failed")
            yield failed(TinsmithError(INTERNAL))
