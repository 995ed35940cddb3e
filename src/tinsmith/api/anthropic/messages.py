"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Response, post

from tinsmith.api.admission import Draft
from tinsmith.api.anthropic.body import HARMLESS, UNOFFERED, MessagesBody, PromptBody, check_betas, read_chat
from tinsmith.api.auth import Call
from tinsmith.api.dialects import anthropic_error, problem_of
from tinsmith.api.sampling import weight_of
from tinsmith.api.services import ServicesDep
from tinsmith.api.texts.asking import Asked, Silence
from tinsmith.api.texts.choices import Choice, Delta
from tinsmith.api.texts.events import frame, open_stream
from tinsmith.api.texts.fields import read_fields, read_text_body
from tinsmith.api.texts.leaving import unless_gone
from tinsmith.api.texts.models import find_model
from tinsmith.api.texts.pictures import Gallery, fetch_named
from tinsmith.api.texts.prompts import chat_prompt, check_length, count_tokens
from tinsmith.api.texts.room import Room, RoomDep
from tinsmith.api.texts.toolcalls import ToolCall
from tinsmith.errors import TinsmithError
from tinsmith.store.rows import Principal
from tinsmith.types import SamplePiece, SampleResult
from tinsmith.validate.jsonform import json_grammar
from tinsmith.wire.media import JSON, encode_json

CALL_PREFIX = "toolu_"


@dataclass(frozen=True, slots=True)
class MessageJob:
    """A request that can be carried out. reads_calls: tools are on offer, so calls are looked for."""

    body: MessagesBody
    asked: Asked
    reads_calls: bool


@post("/messages", status_code=200, request_max_body_size=None)
async def create_message(request: Call, services: ServicesDep, room: RoomDep) -> Response[Any]:
    """Answer a chat."""
    check_betas(request.headers.getall("anthropic-beta", []))
    body = await read_text_body(request, services)
    fetched = await fetch_named(request, services, body)
    job = await services.digest(request.user, weight_of(body), _read, room, request.user, body, fetched)
    draft = await room.desk.draft(request.user, job.asked, stream=job.body.stream)
    if job.body.stream:
        return await open_stream(request, _frames(room, request.user, job, draft), _failed_frame)
    result = await unless_gone(request, room.desk.answer(request.user, draft))
    return Response(await services.work(_message, room, job, draft, result), media_type=JSON)


@post("/messages/count_tokens", status_code=200, request_max_body_size=None)
async def count_message_tokens(request: Call, services: ServicesDep, room: RoomDep) -> Response[Any]:
    """How many tokens the prompt of a chat has, also of one that no context would hold; nothing is sampled."""
    check_betas(request.headers.getall("anthropic-beta", []))
    body = await read_text_body(request, services)
    fetched = await fetch_named(request, services, body)
    count = await services.digest(request.user, weight_of(body), _count, room, request.user, body, fetched)
    return Response(encode_json({"input_tokens": count}), media_type=JSON)


def _read(room: Room, principal: Principal, data: bytes, fetched: Mapping[str, bytes]) -> MessageJob:
    body = read_fields(data, MessagesBody, UNOFFERED, HARMLESS)
    model = find_model(room.services, principal, body.model)
    chat = read_chat(body, Gallery(is_open=model.info.vision is not None, fetched=fetched))
    prompt = chat_prompt(room.tokenizer(model), model, chat, room.services.sight(model.info))
    asked = Asked(
        model=model,
        prompt=check_length(model, prompt.tokens, body.max_tokens),
        pictures=prompt.pictures,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        stop=tuple(body.stop_sequences),
        json_schema=body.json_schema,
    )
    return MessageJob(body, asked, reads_calls=chat.tools is not None)


def _count(room: Room, principal: Principal, data: bytes, fetched: Mapping[str, bytes]) -> int:
    body = read_fields(data, PromptBody, UNOFFERED, HARMLESS)
    model = find_model(room.services, principal, body.model)
    gallery = Gallery(is_open=model.info.vision is not None, fetched=fetched)
    chat, tokenizer = read_chat(body, gallery), room.tokenizer(model)
    schema = body.json_schema
    if schema is not None:
        json_grammar(schema)
    return count_tokens(tokenizer, model, chat, room.services.sight(model.info))


def _choice(room: Room, job: MessageJob) -> Choice:
    return room.choice(job.asked.model, job.asked.stop, CALL_PREFIX if job.reads_calls else None)


def _head(job: MessageJob, draft: Draft) -> dict[str, Any]:
    return {
        "id": f"msg_{draft.op_id}",
        "type": "message",
        "role": "assistant",
        "model": job.asked.model.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _message(room: Room, job: MessageJob, draft: Draft, result: SampleResult) -> bytes:
    choice = _choice(room, job)
    delta = choice.end(result.sequences[0])
    content = [
        {"type": "text", "text": item} if isinstance(item, str) else _tool_use(item, msgspec.Raw(item.arguments))
        for item in _joined(delta)
    ]
    return encode_json({**_head(job, draft), **_stop(choice, delta), "content": content, "usage": _usage(job, result)})


async def _frames(room: Room, principal: Principal, job: MessageJob, draft: Draft) -> AsyncGenerator[bytes, None]:
    choice, blocks = _choice(room, job), _Blocks()
    has_begun = False
    async with aclosing(room.desk.follow(principal, draft)) as events:
        async for event in events:
            if isinstance(event, Silence):
                yield frame({"type": "ping"}, "ping")
                continue
            if not has_begun:
                has_begun = True
                start = {**_head(job, draft), "usage": {"input_tokens": len(job.asked.prompt), "output_tokens": 0}}
                yield frame({"type": "message_start", "message": start}, "message_start")
            delta = choice.add(event) if isinstance(event, SamplePiece) else choice.end(event.sequences[0])
            for each in blocks.add(delta):
                yield each
            if isinstance(event, SampleResult):
                for each in blocks.end():
                    yield each
                body = {"type": "message_delta", "delta": _stop(choice, delta), "usage": _usage(job, event)}
                yield frame(body, "message_delta")
    yield frame({"type": "message_stop"}, "message_stop")


class _Blocks:
    """Content blocks of a stream: one is open at a time, text goes on in the open one."""

    def __init__(self) -> None:
        self._index = 0
        self._is_open = False

    def add(self, delta: Delta) -> list[bytes]:
        frames: list[bytes] = []
        for item in delta.items:
            if isinstance(item, str):
                if not self._is_open:
                    frames.append(self._start({"type": "text", "text": ""}))
                frames.append(self._delta({"type": "text_delta", "text": item}))
            else:
                frames += [*self.end(), self._start(_tool_use(item, {}))]
                frames += [self._delta({"type": "input_json_delta", "partial_json": item.arguments}), *self.end()]
        return frames

    def end(self) -> list[bytes]:
        """Close the open block, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        self._index += 1
        return [frame({"type": "content_block_stop", "index": self._index - 1}, "content_block_stop")]

    def _start(self, block: dict[str, Any]) -> bytes:
        self._is_open = True
        body = {"type": "content_block_start", "index": self._index, "content_block": block}
        return frame(body, "content_block_start")

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return frame({"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta")


def _joined(delta: Delta) -> list[str | ToolCall]:
    """Neighbouring texts as one."""
    joined: list[str | ToolCall] = []
    for item in delta.items:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    return joined


def _tool_use(call: ToolCall, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.call_id, "name": call.name, "input": arguments}


def _stop(choice: Choice, delta: Delta) -> dict[str, Any]:
    ending = delta.ending
    if choice.num_calls:
        reason = "tool_use"
    elif ending is None or not ending.is_whole:
        reason = "max_tokens"
    else:
        reason = "end_turn" if ending.stop_string is None else "stop_sequence"
    stop = ending.stop_string if ending is not None and reason == "stop_sequence" else None
    return {"stop_reason": reason, "stop_sequence": stop}


def _usage(job: MessageJob, result: SampleResult) -> dict[str, int]:
    """Output tokens are all that were sampled, the end token included."""
    return {"input_tokens": len(job.asked.prompt), "output_tokens": len(result.sequences[0].tokens)}


def _failed_frame(error: TinsmithError) -> bytes:
    problem, status = problem_of(error)
    return frame(anthropic_error(problem, status), "error")
