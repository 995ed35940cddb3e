"""Training: a run and its passes and steps."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from litestar import post
from litestar.params import JSONBody
from msgspec import Struct

from tinsmith.api.admission import Draft, Promise, admit, attempt, rejected
from tinsmith.api.auth import Call
from tinsmith.api.body import BodyTooLarge, read_body
from tinsmith.api.gaps import refuse_far_ahead
from tinsmith.api.intake import hold_of
from tinsmith.api.pointers import with_training_pictures
from tinsmith.api.replaying import with_routes
from tinsmith.api.services import LIGHT_BYTES, Services, ServicesDep
from tinsmith.bases.catalog import hub_name
from tinsmith.bases.tokenizer_files import directory_of
from tinsmith.config import LOOPBACK, Settings
from tinsmith.errors import GoneError, TinsmithError, UnsupportedError, UserError
from tinsmith.store.copies import UNTRAINABLE
from tinsmith.store.rows import LossRow, NewRun, Principal, RunRow
from tinsmith.types import BaseInfo, Failure, LossSpec, OpKind, RunId, RunSpec, RunStatus, SessionId, Targets
from tinsmith.validate.custom import check_custom_training, loss_id_of
from tinsmith.validate.lora_fields import check_extras, extra_fields, read_extras
from tinsmith.validate.picture_files import may_hold_pictures
from tinsmith.validate.requests import (
    CUSTOM,
    MAX_SEED,
    check_adam,
    check_lora,
    check_metadata,
    check_optimizer,
    check_training,
)
from tinsmith.wire.bounds import check_bounds, read_address
from tinsmith.wire.custom_loss import decode_custom_loss
from tinsmith.wire.media import PROTOBUF, WireError, decode_json
from tinsmith.wire.meta import CreateMeta, LossMeta, to_meta
from tinsmith.wire.requests import (
    CreateModel,
    GetInfo,
    LoraConfig,
    NewRunAddress,
    OptimizerConfig,
    RunAddress,
    decode_optim_step,
)
from tinsmith.wire.training import decode_training


class ModelData(Struct):
    arch: str
    model_name: str
    tokenizer_id: str


class RunInfo(Struct):
    model_id: str
    model_data: ModelData
    model_name: str
    lora_rank: int | None
    is_lora: bool = True
    optimizer_config: OptimizerConfig = OptimizerConfig()
    type: str = "get_info"


@post("/create_model", status_code=200, request_max_body_size=None)
async def create_model(request: Call, services: ServicesDep) -> Promise:
    """Make a run: a fresh LoRA adapter on a base model."""
    body = await read_body(request, services)
    draft = await services.work(_draft_create, services, request.user, body)
    row = await admit(services, request.user, draft)
    return Promise(request_id=row.id, model_id=row.run_id)


@post("/get_info", status_code=200)
async def get_info(request: Call, services: ServicesDep, data: JSONBody[GetInfo]) -> RunInfo:
    """What a client has to know of a run: its base, its rank, where to load the tokenizer from."""
    run = await services.work(services.store.runs.get, request.user.tenant_id, RunId(data.model_id))
    info = services.base(run.spec.base_model).info
    tokenizer = str(directory_of(info)) if gives_path(services.settings) else hub_name(info.name)
    return RunInfo(
        model_id=run.run_id,
        model_data=ModelData(arch=info.arch, model_name=info.name, tokenizer_id=tokenizer),
        model_name=info.name,
        lora_rank=run.spec.rank or None,
        is_lora=not run.spec.is_full,
    )


@post("/forward_backward", status_code=200, request_max_body_size=None)
async def forward_backward(request: Call, services: ServicesDep) -> Promise:
    """One chunk of a forward or forward_backward call; the body is protobuf."""
    try:
        body = await read_body(request, services, services.settings.max_body_bytes)
    except BodyTooLarge as error:
        await _consume(services, request.user, error)
        raise
    take = hold_of(request.scope).take
    refusal = None
    try:
        body = await with_training_pictures(services, request.user, body, take)
    except UserError as error:
        refusal = error
    weight = max(len(body), LIGHT_BYTES + 1) if may_hold_pictures(body) else len(body)
    draft = await services.digest(request.user, weight, _draft_training, services, request.user, body, take, refusal)
    row = await admit(services, request.user, draft)
    return Promise(request_id=row.id, model_id=row.run_id)


@post("/optim_step", status_code=200, request_max_body_size=None)
async def optim_step(request: Call, services: ServicesDep) -> Promise:
    """Apply and zero the run's accumulated gradients."""
    body = await read_body(request, services)
    draft = await services.work(_draft_optim_step, services, request.user, body)
    row = await admit(services, request.user, draft)
    return Promise(request_id=row.id, model_id=row.run_id)


def gives_path(settings: Settings) -> bool:
    """Whether clients are told the base's directory as its tokenizer: they are on this machine, or it was set so."""
    url = settings.public_url
    is_local = settings.is_loopback and (not url or urlsplit(url).hostname in LOOPBACK)
    return settings.tokenizer_id == "path" or (settings.tokenizer_id == "auto" and is_local)


def new_run_draft(services: Services, principal: Principal, address: NewRunAddress) -> Draft:
    """The address of a run that is to be made in a session of the caller's.

    Raises:
        NotFoundError: no such session.
    """
    session = services.store.sessions.get(principal.tenant_id, SessionId(address.session_id))
    run_id = RunId(f"{session.session_id}:train:{address.model_seq_id}")
    run = NewRun(
        tenant_id=principal.tenant_id,
        session_id=session.session_id,
        model_seq_id=address.model_seq_id,
        spec=RunSpec(run_id=run_id, base_model=""),
    )
    return Draft(kind=OpKind.CREATE, base_model="", seq_id=0, run_id=run_id, run=run)


def with_spec(draft: Draft, meta: CreateMeta, info: BaseInfo, user_metadata: Mapping[str, Any] | None) -> Draft:
    """A draft from `new_run_draft`, completed with what makes the run.

    Raises:
        UserError: the metadata is too large.
    """
    if draft.run is None:
        raise TinsmithError(f"{draft.kind} makes no run")
    run = replace(
        draft.run,
        spec=meta.spec,
        user_metadata=extra_fields(meta.spec) | check_metadata(user_metadata),
        adapter_bytes=info.adapter_bytes(meta.spec),
    )
    return replace(draft, base_model=meta.spec.base_model, meta=to_meta(meta), run=run)


def refuse_if_off(settings: Settings) -> None:
    """Raises: UnsupportedError: custom losses are not evaluated by this server."""
    if not settings.custom_losses:
        raise UnsupportedError(
            "custom losses are not evaluated by this server (--no-custom-losses): pass the function itself to "
            "forward_backward_custom, the client evaluates it then"
        )


def refuse_finished_session(services: Services, principal: Principal, session_id: str) -> None:
    """Raises: GoneError: the session has ended, or fell silent."""
    session = services.store.sessions.get(principal.tenant_id, SessionId(session_id))
    if session.finished_at is not None:
        raise GoneError(f"session {session_id} has ended ({session.finish_reason}): make a new ServiceClient")


def run_draft(services: Services, principal: Principal, kind: OpKind, address: RunAddress) -> Draft:
    """The address of an op on a run of the caller's; rejected if the run only holds a copy.

    Raises:
        NotFoundError: no such run.
        UserError: the seq_id is far beyond the run's others.
    """
    return draft_on(services.store.runs.get(principal.tenant_id, RunId(address.model_id)), kind, address)


def draft_on(run: RunRow, kind: OpKind, address: RunAddress) -> Draft:
    """The same for a run that was looked up.

    Raises:
        UserError: the seq_id is far beyond the run's others.
    """
    refuse_far_ahead(run, address.seq_id)
    draft = Draft(kind=kind, base_model=run.spec.base_model, seq_id=address.seq_id, run_id=run.run_id)
    return rejected(draft, UserError(UNTRAINABLE)) if run.status is RunStatus.COPY else draft


def _draft_create(services: Services, principal: Principal, body: bytes) -> Draft:
    address = decode_json(body, NewRunAddress)
    draft = new_run_draft(services, principal, address)
    return attempt(draft, partial(_fill_create, services, principal, address, body))


def _fill_create(services: Services, principal: Principal, address: NewRunAddress, body: bytes, draft: Draft) -> Draft:
    refuse_finished_session(services, principal, address.session_id)
    asked = decode_json(body, CreateModel)
    info = services.base(asked.base_model).info
    check_optimizer((asked.optimizer_config or OptimizerConfig()).type)
    lora = asked.lora_config or LoraConfig()
    targets = Targets(attn=lora.train_attn, mlp=lora.train_mlp, unembed=lora.train_unembed)
    spec = RunSpec(
        run_id=RunId(str(draft.run_id)),
        base_model=asked.base_model,
        rank=lora.rank,
        seed=secrets.randbelow(MAX_SEED) if lora.seed is None else lora.seed,
        targets=targets,
    )
    spec = read_extras(check_metadata(asked.user_metadata), services.settings.lora_max_rank).of_new_run(spec)
    check_lora(lora.rank, lora.seed, spec.targets, services.settings)
    check_extras(spec, info)
    return with_spec(draft, CreateMeta(spec=spec), info, asked.user_metadata)


def _draft_training(
    services: Services, principal: Principal, body: bytes, take: Callable[[int], None], refusal: UserError | None
) -> Draft:
    address = read_address(body)
    if address is None:
        raise WireError("no forward_backward request: it needs a model_id and a seq_id of at least 1")
    draft = run_draft(services, principal, OpKind.FORWARD_BACKWARD, RunAddress(*address))
    if refusal is not None and draft.failure is None:
        return rejected(draft, refusal)
    return attempt(draft, partial(fill_training, services, principal, body, take))


def fill_training(
    services: Services, principal: Principal, body: bytes, take: Callable[[int], None], draft: Draft
) -> Draft:
    """The draft of a training request with what the body asks for. A custom loss is looked up, which may block. `take`
    is told of bytes that are held beside the body, before they are.

    Raises:
        UserError: it can't be carried out.
        CapacityError: there is no room for what it needs beside the body now.
    """
    settings, info = services.settings, services.base(draft.base_model).info
    check_bounds(body, settings.max_request_tokens, settings.max_pictures, settings.max_picture_bytes)
    asked = decode_training(body, services.sight(info))
    payload = with_routes(services, principal, body, asked, take) if settings.router_replay else body
    filled = replace(draft, kind=asked.kind, cost_tokens=asked.num_tokens, payload=payload, media=PROTOBUF)
    if asked.loss.name != CUSTOM:
        check_training(asked, info, settings)
        return filled
    refuse_if_off(settings)
    loss = _find_loss(services, principal, RunId(str(draft.run_id)), loss_id_of(asked.loss))
    graph = decode_custom_loss(services.blobs.get(loss.blob))
    check_custom_training(asked.with_graph(graph), graph, info, settings)
    work = sum(LossSpec(CUSTOM, graph=graph).work(datum.num_tokens) for datum in asked.data)
    return replace(filled, cost_tokens=work, meta=to_meta(LossMeta(loss_id=loss.loss_id, blob=loss.blob)))


def _find_loss(services: Services, principal: Principal, run_id: RunId, loss_id: str) -> LossRow:
    """Raises: NotFoundError: no such loss in the run's session."""
    run = services.store.runs.get(principal.tenant_id, run_id)
    return services.store.losses.get(principal.tenant_id, run.session_id, loss_id)


def _draft_optim_step(services: Services, principal: Principal, body: bytes) -> Draft:
    draft = run_draft(services, principal, OpKind.OPTIM_STEP, decode_json(body, RunAddress))
    return attempt(draft, partial(fill_optim_step, body))


def fill_optim_step(body: bytes, draft: Draft) -> Draft:
    """Raises: UserError: parameters that can't be stepped with."""
    check_adam(decode_optim_step(body))
    return replace(draft, payload=body)


async def _consume(services: Services, principal: Principal, error: BodyTooLarge) -> None:
    """A refused chunk must not make the run wait for it forever: its seq_id is consumed by a failed op."""
    address = read_address(error.prefix)
    if address is None:
        return
    draft = await services.work(run_draft, services, principal, OpKind.FORWARD_BACKWARD, RunAddress(*address))
    failure = Failure(code=error.code, category=error.category, message=error.message)
    await admit(services, principal, replace(draft, failure=failure))
