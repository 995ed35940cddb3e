"""POST /chat/completions: messages through the model's own chat template, answers with text and tool calls."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from litestar import Response, post

from tinsmith.api.admission import Draft
from tinsmith.api.auth import Call
from tinsmith.api.oai.fields import HARMLESS, UNOFFERED, CommonBody
from tinsmith.api.oai.shapes import DONE, failed_frame, usage
from tinsmith.api.sampling import weight_of
from tinsmith.api.services import ServicesDep
from tinsmith.api.texts.asking import Asked, Silence
from tinsmith.api.texts.choices import Choice, Delta, Score, scores
from tinsmith.api.texts.events import ALIVE, frame, open_stream
from tinsmith.api.texts.fields import FieldError, UnofferedError, read_fields, read_text_body
from tinsmith.api.texts.leaving import unless_gone
from tinsmith.api.texts.messages import only, plain_messages, plain_tools
from tinsmith.api.texts.models import find_model
from tinsmith.api.texts.pictures import Gallery, fetch_named
from tinsmith.api.texts.prompts import Chat, chat_prompt, check_length
from tinsmith.api.texts.room import Room, RoomDep
from tinsmith.api.texts.toolcalls import ToolCall
from tinsmith.store.rows import Principal
from tinsmith.types import SampledSequence, SamplePiece, SampleResult
from tinsmith.wire.media import JSON, encode_json

MAX_TOP_LOGPROBS = 20
CALL_PREFIX = "call_"


class ChatBody(CommonBody, kw_only=True):
    messages: list[Any]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A request that can be carried out. reads_calls: tools are on offer, so calls are looked for."""

    body: ChatBody
    asked: Asked
    reads_calls: bool


@post("/chat/completions", status_code=200, request_max_body_size=None)
async def create_chat_completion(request: Call, services: ServicesDep, room: RoomDep) -> Response[Any]:
    """Answer a chat."""
    body = await read_text_body(request, services)
    fetched = await fetch_named(request, services, body)
    job = await services.digest(request.user, weight_of(body), _read, room, request.user, body, fetched)
    draft = await room.desk.draft(request.user, job.asked, stream=job.body.stream)
    if job.body.stream:
        return await open_stream(request, _chunks(room, request.user, job, draft), failed_frame)
    result = await unless_gone(request, room.desk.answer(request.user, draft))
    return Response(await services.work(_completion, room, job, draft, result), media_type=JSON)


def _read(room: Room, principal: Principal, data: bytes, fetched: Mapping[str, bytes]) -> ChatJob:
    body = read_fields(data, ChatBody, UNOFFERED, HARMLESS)
    body.check_common(room.services.settings)
    model = find_model(room.services, principal, body.model)
    if body.top_logprobs and not body.logprobs:
        raise FieldError("top_logprobs", "needs logprobs")
    if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise FieldError("top_logprobs", f"must lie in 0..{MAX_TOP_LOGPROBS}")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise FieldError("max_tokens", "is another name of max_completion_tokens: send one of them")
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    gallery = Gallery(is_open=model.info.vision is not None, fetched=fetched)
    messages = plain_messages(body.messages, gallery)
    offered = plain_tools(body.tools or ())
    tools = offered if _uses_tools(body.tool_choice, is_any=bool(offered)) else None
    chat = Chat(messages, tools, options=body.chat_template_kwargs or {}, files=gallery.files)
    prompt = chat_prompt(room.tokenizer(model), model, chat, room.services.sight(model.info))
    asked = Asked(
        model=model,
        prompt=check_length(model, prompt.tokens, max_tokens),
        pictures=prompt.pictures,
        max_tokens=max_tokens,
        stop=body.stops,
        **body.sampling,
        json_schema=_schema(body.response_format, has_tools=tools is not None),
        num_samples=body.n,
        topk=body.top_logprobs,
    )
    return ChatJob(body, asked, reads_calls=tools is not None)


def _uses_tools(choice: Any, *, is_any: bool) -> bool:
    if choice is None or choice == "none":
        return choice is None and is_any
    if choice == "auto":
        if not is_any:
            raise FieldError("tool_choice", "needs tools: give some, or leave it out")
        return True
    raise UnofferedError("tool_choice", "other than auto and none is not offered here: a model can't be made to call")


def _schema(form: Any, *, has_tools: bool) -> str | None:
    """The JSON schema that the answer is held to, as text.

    Raises:
        FieldError, UnofferedError: another form, or tools beside it.
    """
    kind = form.get("type") if isinstance(form, dict) else None
    if form is None:
        return None
    if kind not in ("json_schema", "json_object"):
        raise UnofferedError("response_format", "is text, json_object or json_schema")
    if has_tools:
        raise UnofferedError("response_format", "beside tools is not offered here: a call is no such text")
    if kind == "json_object":
        only(form, ("type",), "response_format")
        return '{"type": "object"}'
    only(form, ("type", "json_schema"), "response_format")
    named = form.get("json_schema")
    if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise FieldError("response_format.json_schema.schema", "must be an object")
    only(named, ("name", "description", "schema", "strict"), "response_format.json_schema")
    return encode_json(named["schema"]).decode()


def _choices(room: Room, job: ChatJob) -> list[Choice]:
    prefix = CALL_PREFIX if job.reads_calls else None
    return [room.choice(job.asked.model, job.asked.stop, prefix) for _ in range(job.body.n)]


def _head(job: ChatJob, draft: Draft, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{draft.op_id}",
        "object": kind,
        "created": int(time.time()),
        "model": job.asked.model.name,
    }


def _completion(room: Room, job: ChatJob, draft: Draft, result: SampleResult) -> bytes:
    choices: list[dict[str, Any]] = []
    for index, (choice, sequence) in enumerate(zip(_choices(room, job), result.sequences, strict=True)):
        delta = choice.end(sequence)
        calls = [_call(call) for call in delta.calls]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not delta.text else delta.text,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(room, job, sequence),
                "finish_reason": _finish_reason(choice, delta),
            }
        )
    counts = usage(len(job.asked.prompt), [result])
    return encode_json({**_head(job, draft, "chat.completion"), "choices": choices, "usage": counts})


async def _chunks(room: Room, principal: Principal, job: ChatJob, draft: Draft) -> AsyncGenerator[bytes, None]:
    head = _head(job, draft, "chat.completion.chunk")
    if job.body.wants_usage:
        head["usage"] = None
    choices = _choices(room, job)
    num_calls = [0] * len(choices)

    def chunk(index: int, delta: dict[str, Any], tokens: SampledSequence | None, reason: str | None) -> bytes:
        logprobs = None if tokens is None else _logprobs(room, job, tokens)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return frame({**head, "choices": [choice]})

    def content(index: int, delta: Delta) -> list[bytes]:
        tokens = delta.tokens if job.body.logprobs and len(delta.tokens.tokens) else None
        parts: list[dict[str, Any]] = [{"content": delta.text}] if delta.text else []
        for call in delta.calls:
            parts.append({"tool_calls": [{"index": num_calls[index], **_call(call)}]})
            num_calls[index] += 1
        if tokens is not None and not parts:
            parts = [{}]
        return [chunk(index, part, tokens if at == 0 else None, None) for at, part in enumerate(parts)]

    has_begun = False
    async with aclosing(room.desk.follow(principal, draft)) as events:
        async for event in events:
            if isinstance(event, Silence):
                yield ALIVE
                continue
            if not has_begun:
                has_begun = True
                for index in range(len(choices)):
                    yield chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, None)
            if isinstance(event, SamplePiece):
                for each in content(event.index, choices[event.index].add(event)):
                    yield each
                continue
            for index, (choice, sequence) in enumerate(zip(choices, event.sequences, strict=True)):
                delta = choice.end(sequence)
                for each in content(index, delta):
                    yield each
                yield chunk(index, {}, None, _finish_reason(choice, delta))
            if job.body.wants_usage:
                yield frame({**head, "choices": [], "usage": usage(len(job.asked.prompt), [event])})
    yield DONE


def _finish_reason(choice: Choice, delta: Delta) -> str:
    if choice.num_calls:
        return "tool_calls"
    return "stop" if delta.ending is not None and delta.ending.is_whole else "length"


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(room: Room, job: ChatJob, sequence: SampledSequence) -> dict[str, Any] | None:
    if not job.body.logprobs:
        return None
    model = job.asked.model
    found = scores(room.tokenizer(model), model.info.eos_tokens, sequence)
    content = [{**_score(scored.token), "top_logprobs": _tops(scored.top)} for scored in found]
    return {"content": content, "refusal": None}


def _tops(top: Sequence[Score]) -> list[dict[str, Any]]:
    return [_score(score) for score in top]


def _score(score: Score) -> dict[str, Any]:
    return {
        "token": score.text,
        "logprob": score.logprob,
        "bytes": None if score.data is None else list(score.data),
    }
