"""A prompt and its parameters as a sample request in the queue, and the wait for its result.

Requests are as durable as those of /api/v1/asample and are admitted by the same door. They are waited for on one
connection and nowhere else, so a request whose client goes away is cancelled, and so is one that is given up here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from tinsmith.api.admission import Draft, admit, new_op_id
from tinsmith.api.endings import cancel
from tinsmith.api.futures import failure_of, result_of
from tinsmith.api.sampling import fill_sample, room_for_sample, weight_of
from tinsmith.api.services import Services
from tinsmith.api.texts.fields import FieldError
from tinsmith.api.texts.models import Model, Seats
from tinsmith.errors import CapacityError, TinsmithError, UserError
from tinsmith.pictures import Picture
from tinsmith.store.rows import OpRow, Principal
from tinsmith.types import Failure, OpId, OpKind, OpState, SamplePiece, SampleResult
from tinsmith.validate.picture_files import kind_of
from tinsmith.wire.media import encode_json
from tinsmith.wire.sampling import decode_sample_result

FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "json_schema",
    "max_tokens",
    "seed",
    "stop",
    "prompt",
)  # messages begin with what is wrong
TICK_S = 10.0  # silence after which a stream shows that it is alive


class RequestFailed(UserError):
    """The request was carried out and failed by the user's mistake."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.code = failure.code


class ServerFailed(TinsmithError):
    """The request was carried out and failed by ours."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.code = failure.code


@dataclass(frozen=True, slots=True)
class Asked:
    """One sample request. prompt: with the placeholders of `pictures` among its tokens. max_tokens None: up to the
    context. stop: strings, beside the model's own end tokens."""

    model: Model
    prompt: Sequence[int]
    max_tokens: int | None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_schema: str | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_samples: int = 1
    topk: int = 0
    pictures: tuple[Picture, ...] = ()

    def body(self) -> bytes:
        """As /api/v1/asample takes it."""
        params: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "json_schema": self.json_schema,
            "seed": self.seed,
            "stop": list(self.stop) or None,
        }
        return encode_json(
            {
                "prompt": {"chunks": list(self._chunks())},
                "sampling_params": params,
                "num_samples": self.num_samples,
                "topk_sample_logprobs": self.topk,
            }
        )

    def _chunks(self) -> Iterator[dict[str, Any]]:
        start = 0
        for picture in self.pictures:
            yield {"type": "encoded_text", "tokens": list(self.prompt[start : picture.start])}
            yield {"type": "image", "data": picture.data, "format": kind_of(picture.data)}
            start = picture.end
        yield {"type": "encoded_text", "tokens": list(self.prompt[start:])}


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing happened for a while."""


Event: TypeAlias = SamplePiece | Silence | SampleResult


class Desk:
    """Takes requests of all compatible endpoints."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._seats = Seats(services)
        self._cancelling: set[asyncio.Task[None]] = set()

    async def draft(self, principal: Principal, asked: Asked, *, stream: bool) -> Draft:
        """The request, checked; nothing is recorded yet.

        Raises:
            UserError: it can't be carried out.
        """
        seat = await self._seats.seat(principal, asked.model)
        draft = Draft(
            kind=OpKind.SAMPLE,
            base_model=asked.model.info.name,
            seq_id=next(seat.seq_ids),
            sampler_id=seat.sampler_id,
            op_id=new_op_id(),
        )
        body = await self._services.work(asked.body)
        fill = partial(fill_sample, self._services, seat.sampler_id, body, draft, stream=stream)
        try:
            return await self._services.digest(principal, weight_of(body), fill)
        except UserError as error:
            name, _, rest = error.message.partition(" ")
            raise FieldError(name, rest) if name in FIELDS else error from None

    async def answer(self, principal: Principal, draft: Draft) -> SampleResult:
        """Raises: RequestFailed, ServerFailed: it failed. CapacityError: there was no answer in time."""
        async with aclosing(self.follow(principal, draft)) as events:
            async for event in events:
                if isinstance(event, SampleResult):
                    return event
        raise AssertionError("a request ends with its result")

    async def follow(self, principal: Principal, draft: Draft) -> AsyncGenerator[Event, None]:
        """Admit the request, and tell what becomes of it: its pieces if it is streamed, at last the whole result.

        Left before its end, it cancels the request; its session lives as long as this waits.

        Raises:
            RequestFailed, ServerFailed: it failed.
            CapacityError: as many as may wait do already, or there was no news for too long.
        """
        services, op_id = self._services, _id_of(draft)
        with services.pieces.following(op_id) as heard:
            admitting = asyncio.create_task(self._admit(principal, draft))
            final = services.waiters.expect(op_id)
            news = asyncio.create_task(heard.news.wait())
            op = None
            try:
                await asyncio.shield(admitting)
                op = await services.work(services.store.ops.get, principal.tenant_id, op_id)
                last_news = kept_at = time.monotonic()
                while not op.state.is_final:
                    if time.monotonic() - kept_at > TICK_S:
                        kept_at = time.monotonic()
                        await self._seats.keep(principal)
                    done, _ = await asyncio.wait((final, news), timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                    if news in done:
                        last_news = time.monotonic()
                        for piece in heard.take():
                            yield piece
                        news = asyncio.create_task(heard.news.wait())
                    elif final in done:
                        if services.waiters.is_closed:
                            raise CapacityError("the server is being restarted: send the request again")
                        op = await services.work(services.store.ops.get, principal.tenant_id, op_id)
                    elif time.monotonic() - last_news > services.settings.answer_hold_s:
                        raise CapacityError(await services.work(self._overdue, op))
                    else:
                        yield Silence()
                yield await services.work(self._result, op)
            finally:
                if not ((op is not None and op.state.is_final) or _was_refused(admitting)):
                    self._give_up(principal, admitting, op_id)
                services.waiters.forget(op_id, final)
                news.cancel()
                with suppress(asyncio.CancelledError):
                    await news

    async def settle(self) -> None:
        """Wait until all that was given up has been cancelled."""
        await asyncio.gather(*self._cancelling, return_exceptions=True)

    async def _admit(self, principal: Principal, draft: Draft) -> None:
        async with room_for_sample(self._services, principal.tenant_id):
            await admit(self._services, principal, draft)

    def _give_up(self, principal: Principal, admitting: asyncio.Task[None], op_id: OpId) -> None:
        """In a task of its own, as the caller's may be cancelled at every await."""
        task = asyncio.create_task(self._cancel(principal, admitting, op_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel(self, principal: Principal, admitting: asyncio.Task[None], op_id: OpId) -> None:
        with suppress(TinsmithError):  # it is refused after all
            await admitting
            await cancel(self._services, principal, op_id)

    def _overdue(self, op: OpRow) -> str:
        waited = self._services.settings.answer_hold_s
        why = self._services.look_why_waiting(op).reason
        return f"no answer within {waited:.0f} s ({why}): send the request again later"

    def _result(self, op: OpRow) -> SampleResult:
        if op.state is OpState.DONE:
            return decode_sample_result(result_of(self._services, op))
        failure = failure_of(op)
        raise RequestFailed(failure) if failure.category == "user" else _not_ours_alone(failure)


def _was_refused(admitting: asyncio.Task[None]) -> bool:
    return admitting.done() and not admitting.cancelled() and admitting.exception() is not None


def _id_of(draft: Draft) -> OpId:
    if draft.op_id is None:
        raise ValueError("the draft has no id")
    return draft.op_id


def _not_ours_alone(failure: Failure) -> TinsmithError:
    return CapacityError(failure.message) if failure.category == "capacity" else ServerFailed(failure)
