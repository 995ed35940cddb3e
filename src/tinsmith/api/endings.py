"""How sample requests end from the client's side: one poll for all that a sampling client waits for, and cancelling.

A poll tells which requests have ended and not how; their results are fetched with retrieve_future.
"""

from __future__ import annotations

import time
from functools import partial

from litestar import post
from litestar.params import JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.pauses import ACTIVE
from tinsmith.api.services import Services, ServicesDep
from tinsmith.errors import UnsupportedError
from tinsmith.store.end_rows import Ended, EndsAfter
from tinsmith.store.rows import OpRow, Principal
from tinsmith.types import OpId, OpState, SamplerId
from tinsmith.wire.requests import CLONE_SEQS, CancelFuture, RetrieveFutures

PAGE = 1000
FEW = 4


class Completion(Struct, omit_defaults=True):
    """state: finished (there is a result of so many bytes) or failed; finished without a size: ask for it alone."""

    request_id: str
    state: str
    response_payload_uncompressed_size: int | None = None


class Completions(Struct):
    """cursor: what to send as prev_cursor next."""

    completions: list[Completion]
    cursor: int


class Cancelled(Struct):
    request_id: str
    state: str


@post("/retrieve_futures", status_code=200)
async def retrieve_futures(request: Call, services: ServicesDep, data: JSONBody[RetrieveFutures]) -> Completions:
    """The requests of one sampling client that have ended since the last poll; waits for one if there is none."""
    if not services.settings.retrieve_futures:
        raise UnsupportedError("retrieve_futures is turned off here (--no-retrieve-futures): use retrieve_future")
    target = data.target
    sampler_id = SamplerId(target.sampling_session_id)
    await services.work(services.store.samplers.get, request.user.tenant_id, sampler_id)
    services.polls.of_sampler(sampler_id, target.cloned_sampler_id)
    hold_s = _hold_s(services, data)
    ended = await _ended(services, sampler_id, target.cloned_sampler_id, data.prev_cursor, hold_s)
    if not ended and hold_s > 0:
        paused = await services.work(_paused, services, sampler_id, target.cloned_sampler_id)
        services.telling.name(paused)
        return Completions([Completion(op_id, "finished") for op_id in paused], data.prev_cursor)
    return Completions(
        completions=[_completion(end) for end in ended], cursor=ended[-1].num if ended else data.prev_cursor
    )


@post("/cancel_future", status_code=200)
async def cancel_future(request: Call, services: ServicesDep, data: JSONBody[CancelFuture]) -> Cancelled:
    """Give up a sample request, whether it waits or runs; one that has ended stays as it is."""
    if not services.settings.cancel_future:
        raise UnsupportedError("cancel_future is turned off here (--no-cancel-future): let the request end")
    return await cancel(services, request.user, OpId(data.request_id))


async def cancel(services: Services, principal: Principal, op_id: OpId) -> Cancelled:
    """End a sample request of the caller's, free what it holds, and wake who waits for it.

    Raises:
        GoneError: no such request of this tenant.
        UnsupportedError: it is no sample.
    """
    op = await services.write(services.store.endings.cancel, principal.tenant_id, op_id, time.time())
    if op.state.is_final:
        return Cancelled(op_id, op.state)
    services.ring(op.base_model)
    services.waiters.ring()
    return Cancelled(op_id, OpState.CANCELLED)


def _hold_s(services: Services, data: RetrieveFutures) -> float:
    hold_s = services.settings.poll_hold_s
    if data.timeout is None:
        return hold_s
    return min(hold_s, data.timeout) if data.timeout > 0 else 0.0


async def _ended(services: Services, sampler_id: SamplerId, clone: int, after: int, hold_s: float) -> list[Ended]:
    """Wakes at every end of the sampler's requests, and goes on waiting if it was another client's. Empty too when
    there is news of why the oldest wait."""
    deadline = time.monotonic() + hold_s
    seqs = (clone * CLONE_SEQS, (clone + 1) * CLONE_SEQS)
    seen = after
    while True:
        mark = EndsAfter(sampler_id, seen)
        future = services.waiters.expect(mark)
        try:
            ended, last = await services.work(services.store.endings.after, sampler_id, after, *seqs, PAGE)
            left_s = deadline - time.monotonic()
            if ended or left_s <= 0:
                return ended
            if last <= seen:
                with services.telling.of_shared(mark, clone, partial(_oldest, services, sampler_id, clone), future):
                    has_ended = await services.waiters.hold(future, left_s)
                if not has_ended:
                    return []
            seen = max(seen, last)
        finally:
            services.waiters.forget(mark, future)


def _paused(services: Services, sampler_id: SamplerId, clone: int) -> list[OpId]:
    """The oldest few waiting requests of a sampling client, if they are paused.

    This answer can't say why they wait. A client that is told of them asks for each by retrieve_future, which can.
    """
    oldest = _oldest(services, sampler_id, clone)
    return [op.id for op in oldest if services.look_why_waiting(op).state != ACTIVE]


def _oldest(services: Services, sampler_id: SamplerId, clone: int) -> list[OpRow]:
    return services.store.endings.waiting(sampler_id, clone * CLONE_SEQS, (clone + 1) * CLONE_SEQS, FEW)


def _completion(end: Ended) -> Completion:
    if end.state is OpState.DONE:
        return Completion(end.op_id, "finished", end.result_bytes)
    return Completion(end.op_id, "failed")
