"""retrieve_future: the one way out of the queue. Results are the stored bytes, served unchanged as often as asked.

Large ones are read from their files as fast as the client takes them, so many of each tenant's at one time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

import structlog
from litestar import Response, post
from litestar.params import JSONBody
from litestar.response import Stream
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.gaps import close_gap
from tinsmith.api.marks import bind_op
from tinsmith.api.outgo import PIECE_BYTES, closing_with
from tinsmith.api.pauses import ACTIVE, Waiting
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.waiters import Ended
from tinsmith.errors import CorruptError, GoneError, NotFoundError
from tinsmith.files.virtual_file import VirtualFile
from tinsmith.store.checksums import whole_result
from tinsmith.store.rows import OpRow
from tinsmith.types import BlobKey, Failure, OpId, OpState, TenantId
from tinsmith.wire.media import JSON, encode_json
from tinsmith.wire.requests import RetrieveFuture
from tinsmith.wire.results import failure_result

log = structlog.get_logger("tinsmith.api")

SPREAD = 20  # polls are held up to a 20th longer, so that those that came together don't always come together
CANCELLED = Failure(
    code="cancelled", category="user", message="the request was cancelled, by its client or because its session ended"
)
LOST = Failure(code="internal", category="server", message="the request failed without a reason; see the server's log")


class TryAgain(Struct):
    """The answer to a poll that ended before its op did. The reason is shown to users."""

    request_id: str
    queue_state: str
    queue_state_reason: str
    type: str = "try_again"


@post("/retrieve_future", status_code=200)
async def retrieve_future(request: Call, services: ServicesDep, data: JSONBody[RetrieveFuture]) -> Response[Any]:
    """The result of a request, its failure, or 408 after a hold: poll again."""
    op = await come_to(services, request.user.tenant_id, OpId(data.request_id))
    bind_op(op)
    if op.state is OpState.DONE and op.result_blob is not None and op.result_bytes > PIECE_BYTES:
        return await _read_out(request, services, op, op.result_blob)
    if op.state.is_final:
        return await services.work(_answer, services, op)
    return _later(await try_again(services, op))


async def come_to(services: Services, tenant_id: TenantId, op_id: OpId) -> OpRow:
    """The op once it is final, or as it was before a hold in which nobody saw it end.

    Raises:
        GoneError: no such op of this tenant, or its result has expired.
    """
    seen = services.recent.find(tenant_id, op_id)
    if seen is not None and seen.state.is_final:
        services.polls.of_sample(seen)
        return seen
    future = services.waiters.expect(op_id)
    try:
        if seen is None:
            op = await services.op(tenant_id, op_id)
        else:
            op = seen
            services.recent.forget(op_id)
        services.polls.of_sample(op)
        if not op.state.is_final:
            await _hold(services, op, future)
            op = services.waiters.outcome(future) or op
            services.polls.of_sample(op)
            if not op.state.is_final:
                services.recent.left(op)
    finally:
        services.waiters.forget(op_id, future)
    return op


async def _hold(services: Services, op: OpRow, future: asyncio.Future[Ended | bool]) -> None:
    """Until it has ended, or there is news of why it waits, for as long as a poll may take. Who was told a moment ago
    that it is paused asks why, and isn't held."""
    if services.telling.is_asked_why(op.id):
        return
    with services.telling.of_poll(op, future):
        await services.waiters.hold(future, services.settings.poll_hold_s * (1 + random.random() / SPREAD))


async def try_again(services: Services, op: OpRow) -> bytes:
    """The body of the 408 for an op that isn't final yet."""
    why = await services.why_waiting(op)
    services.telling.told(op.id, why)
    if why.missing_seq is not None and time.time() - op.created_at > services.settings.gap_timeout_s:
        await close_gap(services, op)
    return _try_again(op.id, why)


def _try_again(op_id: OpId, why: Waiting) -> bytes:
    return encode_json(TryAgain(request_id=op_id, queue_state=why.state, queue_state_reason=why.reason))


def _later(body: bytes) -> Response[bytes]:
    return Response(body, media_type=JSON, status_code=408)


async def _read_out(request: Call, services: Services, op: OpRow, blob: BlobKey) -> Response[Any]:
    """The result as it lies in its file. It waits for a place as long as a poll waits for its op."""
    place = await services.results_out.try_take(op.tenant_id, services.settings.poll_hold_s)
    if place is None:
        return _later(
            _try_again(
                op.id, Waiting(ACTIVE, "the result is there; others that were asked for are not read to their end yet")
            )
        )
    closing = closing_with(request.scope)
    closing.callback(services.results_out.give_back, place)
    try:
        source = closing.enter_context(await services.work(services.blobs.open_checked, blob))
    except NotFoundError:
        raise GoneError("unknown or expired request id") from None
    except CorruptError as error:
        return Response(damaged_result(error), media_type=JSON)
    headers = {"content-length": str(op.result_bytes)}
    return Stream(_pieces(services, source, op.result_bytes), headers=headers, media_type=op.result_media or JSON)


async def _pieces(services: Services, source: BinaryIO, num_bytes: int) -> AsyncIterator[bytes]:
    parts = VirtualFile.whole(num_bytes).read(source)
    while part := await services.work(next, parts, b""):
        yield part


def _answer(services: Services, op: OpRow) -> Response[bytes]:
    if op.state is not OpState.DONE:
        return Response(failure_result(failure_of(op)), media_type=JSON)
    try:
        return Response(result_of(services, op), media_type=op.result_media or JSON)
    except CorruptError as error:
        return Response(damaged_result(error), media_type=JSON)


def damaged_result(error: CorruptError) -> bytes:
    """The answer to a poll whose result isn't what was stored: a failure for good, since clients ask again at once, and
    without end, after a status of 500."""
    log.error("a result is damaged", error=error.message)
    return failure_result(error.as_failure())


def failure_of(op: OpRow) -> Failure:
    """Why a final op has no result."""
    return op.failure or (CANCELLED if op.state is OpState.CANCELLED else LOST)


def result_of(services: Services, op: OpRow) -> bytes:
    """The stored bytes of a DONE op.

    Raises:
        GoneError: they have expired.
        CorruptError: they aren't what was stored.
    """
    if op.result_blob is None:
        return whole_result(op) or b""
    try:
        return services.blobs.get(op.result_blob)
    except NotFoundError:
        raise GoneError("unknown or expired request id") from None
