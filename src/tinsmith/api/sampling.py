"""Sampling sessions (samplers) and sample requests."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import structlog
from litestar import get, post
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from tinsmith.api.admission import Draft, Promise, admit, attempt, rejected
from tinsmith.api.auth import Call
from tinsmith.api.body import TOKENS_BYTES, read_prompt_body
from tinsmith.api.intake import hold_of
from tinsmith.api.pointers import with_pictures
from tinsmith.api.services import LIGHT_BYTES, Services, ServicesDep
from tinsmith.api.sharing import find_checkpoint
from tinsmith.api.training import refuse_finished_session
from tinsmith.errors import UnsupportedError, UserError
from tinsmith.store.rows import NewSampler, OpRow, Principal
from tinsmith.types import CheckpointKind, OpKind, SamplerId, SessionId, TenantId
from tinsmith.validate.requests import MAX_SEED, check_sample
from tinsmith.wire.media import decode_json
from tinsmith.wire.meta import SampleMeta, to_meta
from tinsmith.wire.requests import CreateSamplingSession, JoinSamplingSession, SamplerAddress
from tinsmith.wire.sampling import decode_sample

log = structlog.get_logger("tinsmith.api")


class SamplingSessionCreated(Struct):
    sampling_session_id: str
    type: str = "create_sampling_session"


class SamplingSessionJoined(Struct):
    client_counter: int
    type: str = "join_sampling_session"


class SamplerInfo(Struct, omit_defaults=True):
    sampler_id: str
    base_model: str
    model_path: str | None = None


@post("/create_sampling_session", status_code=200)
async def create_sampling_session(
    request: Call, services: ServicesDep, data: JSONBody[CreateSamplingSession]
) -> SamplingSessionCreated:
    """A sampler over a base model, or over the weights of a sampler checkpoint. Idempotent on its sequence number."""
    new = await services.work(new_sampler, services, request.user, data)
    services.disk.take(request.user.tenant_id, 0)
    row = await services.write(services.store.samplers.create, new, time.time())
    return SamplingSessionCreated(sampling_session_id=row.sampler_id)


@get("/samplers/{sampler_id:str}")
async def get_sampler(request: Call, services: ServicesDep, sampler_id: FromPath[str]) -> SamplerInfo:
    """What a sampler samples from."""
    row = await services.work(services.store.samplers.get, request.user.tenant_id, SamplerId(sampler_id))
    return SamplerInfo(sampler_id=row.sampler_id, base_model=row.base_model, model_path=row.model_path)


@post("/join_sampling_session", status_code=200)
async def join_sampling_session(
    request: Call, services: ServicesDep, data: JSONBody[JoinSamplingSession]
) -> SamplingSessionJoined:
    """A number of its own for a copy of a sampling client; the copy's seq_ids start at that many thousand millions."""
    if not services.settings.join_sampling_session:
        raise UnsupportedError("join_sampling_session is turned off here: draw a number for the copy")
    sampler_id = SamplerId(data.sampling_session_id)
    number = await services.write(services.store.samplers.join, request.user.tenant_id, sampler_id)
    return SamplingSessionJoined(client_counter=number)


@post("/asample", status_code=200, request_max_body_size=None)
async def asample(request: Call, services: ServicesDep) -> Promise:
    """Sample from a sampler; every sequence gets an id of its own, the same for a request that is sent again."""
    body = await read_prompt_body(request, services, TOKENS_BYTES)
    refusal = None
    try:
        body = await with_pictures(services, request.user, body, hold_of(request.scope).take)
    except UserError as error:
        refusal = error
    row = await _admit_sample(services, request.user, body, refusal)
    num_samples = int(row.meta.get("num_samples", 0))
    return Promise(request_id=row.id, sample_sequence_ids=[f"{row.id}-{i}" for i in range(num_samples)])


def weight_of(body: bytes) -> int:
    """For `Services.digest`: bytes, and more where there may be a schema or a picture, which takes longer to check than
    to read."""
    is_slow = any(mark in body for mark in (b"json_schema", b'"image', b"\\u"))
    return max(len(body), LIGHT_BYTES + 1) if is_slow else len(body)


async def _admit_sample(services: Services, principal: Principal, body: bytes, refusal: UserError | None) -> OpRow:
    """`refusal`: what was found wrong with its pictures already."""
    async with room_for_sample(services, principal.tenant_id):
        draft = await services.digest(principal, weight_of(body), _draft_sample, services, principal, body, refusal)
        return await admit(services, principal, draft)


@asynccontextmanager
async def room_for_sample(services: Services, tenant_id: TenantId) -> AsyncIterator[None]:
    """Around what checks and admits one sample request.

    Raises:
        CapacityError: as many as may wait do already.
    """
    room = services.sample_room
    if not room.take_known(tenant_id):
        await services.work(room.take, tenant_id)
    with room.coming(tenant_id):
        yield


def new_sampler(services: Services, principal: Principal, asked: CreateSamplingSession) -> NewSampler:
    """The sampler that is asked for, not yet recorded.

    Raises:
        UserError: no such base model, or not a path to sample from.
        NotFoundError: no such session or checkpoint of this tenant.
        GoneError: the session has ended.
    """
    refuse_finished_session(services, principal, asked.session_id)
    plain = NewSampler(
        tenant_id=principal.tenant_id,
        session_id=SessionId(asked.session_id),
        sampler_id=SamplerId(f"{asked.session_id}:sample:{asked.sampling_session_seq_id}"),
        base_model=asked.base_model or "",
    )
    if asked.model_path is None:
        if asked.base_model is None:
            raise UserError("create_sampling_session needs a base_model or a model_path")
        services.base(asked.base_model)
        return plain
    found = find_checkpoint(services, principal, asked.model_path)
    if found.kind is not CheckpointKind.SAMPLER:
        raise UserError(f"{found.path} is no checkpoint to sample from: save one with save_weights_for_sampler")
    services.base(found.spec.base_model)
    if asked.base_model is not None and asked.base_model != found.spec.base_model:
        raise UserError(f"{found.path} was made on {found.spec.base_model}, not on {asked.base_model[:200]!r}")
    return replace(
        plain,
        base_model=found.spec.base_model,
        model_path=found.path,
        run_id=found.run_id,
        blob=found.blob,
        spec=found.spec,
    )


def _draft_sample(services: Services, principal: Principal, body: bytes, refusal: UserError | None) -> Draft:
    address = decode_json(body, SamplerAddress)
    sampler = services.store.samplers.get(principal.tenant_id, SamplerId(address.sampling_session_id))
    draft = Draft(
        kind=OpKind.SAMPLE, base_model=sampler.base_model, seq_id=address.seq_id, sampler_id=sampler.sampler_id
    )
    if refusal is not None:
        return rejected(draft, refusal)
    return attempt(draft, partial(fill_sample, services, sampler.sampler_id, body))


def fill_sample(services: Services, sampler_id: SamplerId, body: bytes, draft: Draft, *, stream: bool = False) -> Draft:
    """A sample request, checked and with its seed. `stream`: the worker tells of it while it is under way.

    Raises:
        UserError: it can't be carried out.
    """
    info = services.base(draft.base_model).info
    asked = decode_sample(body, services.sight(info))
    check_sample(asked, info, services.settings)
    num_prompt = int(asked.prompt.size)
    if services.settings.log_prompts:
        log.info("prompt", sampler_id=sampler_id, num_samples=asked.num_samples, prompt=asked.prompt.tolist())
    max_tokens = info.max_context - num_prompt if asked.params.max_tokens is None else asked.params.max_tokens
    meta = SampleMeta(
        seed=secrets.randbelow(MAX_SEED) if asked.seed is None else asked.seed,
        sampler_id=sampler_id,
        num_samples=asked.num_samples,
        stream=stream,
    )
    return replace(draft, payload=body, meta=to_meta(meta), cost_tokens=num_prompt + asked.num_samples * max_tokens)
