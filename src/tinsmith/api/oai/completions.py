"""POST /completions: text or tokens, continued as they stand, without a chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Response, post

from tinsmith.api.admission import Draft
from tinsmith.api.auth import Call
from tinsmith.api.oai.fields import HARMLESS, UNOFFERED, CommonBody
from tinsmith.api.oai.shapes import DONE, failed_frame, usage
from tinsmith.api.services import ServicesDep
from tinsmith.api.texts.asking import Asked, Silence
from tinsmith.api.texts.choices import Delta, Scored, scores
from tinsmith.api.texts.events import ALIVE, frame, merge, open_stream
from tinsmith.api.texts.fields import FieldError, read_fields, read_text_body
from tinsmith.api.texts.leaving import unless_gone
from tinsmith.api.texts.models import Model, find_model
from tinsmith.api.texts.prompts import check_length, text_tokens
from tinsmith.api.texts.room import Room, RoomDep
from tinsmith.store.rows import Principal
from tinsmith.types import SampledSequence, SamplePiece, SampleResult
from tinsmith.wire.media import JSON, encode_json

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_LOGPROBS = 20
MAX_PROMPTS = 64
TOKEN_BOUND = 2**31


class CompletionBody(CommonBody, kw_only=True):
    prompt: str | list[Any]
    max_tokens: int = DEFAULT_MAX_TOKENS
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """One request to the sampler for each prompt; choice j of prompt i has the index i * n + j."""

    body: CompletionBody
    model: Model
    asked: list[Asked]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(asked.prompt) for asked in self.asked)


@post("/completions", status_code=200, request_max_body_size=None)
async def create_completion(request: Call, services: ServicesDep, room: RoomDep) -> Response[Any]:
    """Continue one or several prompts."""
    body = await read_text_body(request, services)
    job = await services.digest(request.user, len(body), _read, room, request.user, body)
    drafts = [await room.desk.draft(request.user, asked, stream=job.body.stream) for asked in job.asked]
    if job.body.stream:
        return await open_stream(request, _chunks(room, request.user, job, drafts), failed_frame)
    results = await unless_gone(request, _results(room, request.user, drafts))
    return Response(await services.work(_completion, room, job, drafts, results), media_type=JSON)


def _read(room: Room, principal: Principal, data: bytes) -> CompletionJob:
    body = read_fields(data, CompletionBody, UNOFFERED, HARMLESS)
    model = find_model(room.services, principal, body.model)
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        raise FieldError("logprobs", f"must lie in 0..{MAX_LOGPROBS}")
    prompts = _prompts(room, model, body.prompt)
    body.check_common(room.services.settings, len(prompts))
    asked = [
        Asked(
            model=model,
            prompt=check_length(model, prompt, body.max_tokens),
            max_tokens=body.max_tokens,
            stop=body.stops,
            **body.sampling,
            num_samples=body.n,
            topk=body.logprobs or 0,
        )
        for prompt in prompts
    ]
    return CompletionJob(body, model, asked)


async def _results(room: Room, principal: Principal, drafts: list[Draft]) -> list[SampleResult]:
    results: dict[int, SampleResult] = {}
    async with aclosing(merge([room.desk.follow(principal, draft) for draft in drafts])) as events:
        async for number, event in events:
            if isinstance(event, SampleResult):
                results[number] = event
    return [results[number] for number in range(len(drafts))]


def _prompts(room: Room, model: Model, prompt: str | list[Any]) -> list[list[int]]:
    """A text, tokens, or a list of either."""
    many = prompt if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)) else [prompt]
    if not many or len(many) > MAX_PROMPTS:
        raise FieldError("prompt", f"give 1 to {MAX_PROMPTS} prompts")
    tokenizer = room.tokenizer(model)
    found: list[list[int]] = []
    for index, each in enumerate(many):
        where = f"prompt[{index}]" if many is prompt else "prompt"
        if isinstance(each, str):
            tokens = text_tokens(tokenizer, model, each, add_special_tokens=True)
        else:
            tokens = _token_list(each, where)
        if not tokens:
            raise FieldError(where, "is empty: give at least one token")
        found.append(tokens)
    return found


def _token_list(value: Any, where: str) -> list[int]:
    try:
        tokens = msgspec.convert(value, list[int])
    except msgspec.ValidationError:
        raise FieldError(where, "must be a text, or a list of token ids") from None
    if any(not 0 <= token < TOKEN_BOUND for token in tokens):
        raise FieldError(where, "token ids must lie within the vocabulary")
    return tokens


def _head(job: CompletionJob, drafts: list[Draft]) -> dict[str, Any]:
    return {
        "id": f"cmpl-{drafts[0].op_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": job.model.name,
    }


def _completion(room: Room, job: CompletionJob, drafts: list[Draft], results: list[SampleResult]) -> bytes:
    choices: list[dict[str, Any]] = []
    for sequence in (sequence for result in results for sequence in result.sequences):
        delta = room.choice(job.model, job.body.stops, None).end(sequence)
        choices.append(_choice(len(choices), delta, _logprobs(room, job, sequence, 0)))
    return encode_json(
        {**_head(job, drafts), "choices": choices, "usage": usage(job.num_prompt_tokens, results)},
    )


async def _chunks(
    room: Room, principal: Principal, job: CompletionJob, drafts: list[Draft]
) -> AsyncGenerator[bytes, None]:
    head = _head(job, drafts)
    if job.body.wants_usage:
        head["usage"] = None
    n = job.body.n
    choices = [room.choice(job.model, job.body.stops, None) for _ in range(n * len(drafts))]
    offsets = [0] * len(choices)
    results: list[SampleResult] = []

    def chunk(index: int, delta: Delta) -> bytes:
        logprobs = _logprobs(room, job, delta.tokens, offsets[index])
        if logprobs is not None:
            offsets[index] += sum(map(len, logprobs["tokens"]))
        return frame({**head, "choices": [_choice(index, delta, logprobs)]})

    async with aclosing(merge([room.desk.follow(principal, draft) for draft in drafts])) as events:
        async for number, event in events:
            if isinstance(event, Silence):
                yield ALIVE
            elif isinstance(event, SamplePiece):
                index = number * n + event.index
                delta = choices[index].add(event)
                if delta.text or job.body.logprobs is not None:
                    yield chunk(index, delta)
            else:
                results.append(event)
                for at, sequence in enumerate(event.sequences):
                    yield chunk(number * n + at, choices[number * n + at].end(sequence))
    if job.body.wants_usage:
        yield frame({**head, "choices": [], "usage": usage(job.num_prompt_tokens, results)})
    yield DONE


def _choice(index: int, delta: Delta, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    reason = None if delta.ending is None else "stop" if delta.ending.is_whole else "length"
    return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(room: Room, job: CompletionJob, sequence: SampledSequence, offset: int) -> dict[str, Any] | None:
    """offset: of the first token, in characters of the text as the tokens spell it one by one."""
    if job.body.logprobs is None:
        return None
    found = scores(room.tokenizer(job.model), job.model.info.eos_tokens, sequence)
    offsets: list[int] = []
    for scored in found:
        offsets.append(offset)
        offset += len(scored.token.text)
    return {
        "tokens": [scored.token.text for scored in found],
        "token_logprobs": [scored.token.logprob for scored in found],
        "top_logprobs": [_tops(scored) for scored in found] if job.body.logprobs else None,
        "text_offset": offsets,
    }


def _tops(scored: Scored) -> dict[str, float]:
    """By token text; of two tokens that look alike the likelier one counts. The sampled token is always there."""
    tops = {score.text: score.logprob for score in reversed(scored.top)}
    tops.setdefault(scored.token.text, scored.token.logprob)
    return tops
