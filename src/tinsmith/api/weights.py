"""Checkpoints as ops: save, save for sampling, load; and what a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from litestar import post
from litestar.params import JSONBody
from msgspec import Struct

from tinsmith.api.admission import Draft, Promise, admit, attempt
from tinsmith.api.auth import Call
from tinsmith.api.body import read_body
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.sharing import find_checkpoint
from tinsmith.api.training import new_run_draft, refuse_finished_session, run_draft, with_spec
from tinsmith.config import Settings
from tinsmith.errors import UnsupportedError, UserError
from tinsmith.files.age import check_recipients
from tinsmith.store.rows import CheckpointRow, OpRow, Principal, RunRow
from tinsmith.types import CheckpointKind, OpKind, RunId, RunSpec, SamplerId
from tinsmith.validate.lora_fields import read_extras, shape_text
from tinsmith.validate.requests import check_lora, check_metadata, check_optimizer, check_ttl
from tinsmith.wire.media import decode_json
from tinsmith.wire.meta import CreateMeta, LoadMeta, SaveExternalMeta, SaveMeta, SaveSamplerMeta, to_meta
from tinsmith.wire.paths import check_name
from tinsmith.wire.requests import (
    LoadWeights,
    NewRunAddress,
    OptimizerConfig,
    RunAddress,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
    WeightsInfo,
)

MAX_SEALED_BYTES = 2 * 2**30  # of weights that are encrypted when they are saved


class CheckpointInfo(Struct):
    base_model: str
    lora_rank: int | None
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    is_lora: bool = True
    optimizer_config: OptimizerConfig = OptimizerConfig()


@post("/save_weights", status_code=200, request_max_body_size=None)
async def save_weights(request: Call, services: ServicesDep) -> Promise:
    """Save weights and optimizer state, to go on training from."""
    body = await read_body(request, services)
    draft = await services.work(_draft_save, services, request.user, body)
    return _promise(await admit(services, request.user, draft))


@post("/save_weights_for_sampler", status_code=200, request_max_body_size=None)
async def save_weights_for_sampler(request: Call, services: ServicesDep) -> Promise:
    """Save weights to sample from: under a name, or for a sampling session that is made with them."""
    body = await read_body(request, services)
    draft = await services.work(_draft_save_sampler, services, request.user, body)
    return _promise(await admit(services, request.user, draft))


@post("/save_weights_external", status_code=200, request_max_body_size=None)
async def save_weights_external(request: Call, services: ServicesDep) -> Promise:
    """Save weights as files for other programs, an adapter or a whole model; encrypted to age's public keys, if any are
    given."""
    body = await read_body(request, services)
    draft = await services.work(_draft_save_external, services, request.user, body)
    return _promise(await admit(services, request.user, draft))


@post("/load_weights", status_code=200, request_max_body_size=None)
async def load_weights(request: Call, services: ServicesDep) -> Promise:
    """Load a checkpoint: into a new run (session_id, model_seq_id) or into one that exists (model_id, seq_id)."""
    body = await read_body(request, services)
    draft = await services.work(_draft_load, services, request.user, body)
    return _promise(await admit(services, request.user, draft))


@post("/weights_info", status_code=200)
async def weights_info(request: Call, services: ServicesDep, data: JSONBody[WeightsInfo]) -> CheckpointInfo:
    """The adapter's shape in a checkpoint."""
    spec = (await services.work(find_checkpoint, services, request.user, data.tinker_path)).spec
    return CheckpointInfo(
        base_model=spec.base_model,
        lora_rank=spec.rank or None,
        is_lora=not spec.is_full,
        train_unembed=spec.targets.unembed,
        train_mlp=spec.targets.mlp,
        train_attn=spec.targets.attn,
    )


def _promise(row: OpRow) -> Promise:
    return Promise(request_id=row.id, model_id=row.run_id)


def _draft_save(services: Services, principal: Principal, body: bytes) -> Draft:
    draft = run_draft(services, principal, OpKind.SAVE, decode_json(body, RunAddress))
    return attempt(draft, partial(_fill_save, services.settings, body))


def _fill_save(settings: Settings, body: bytes, draft: Draft) -> Draft:
    asked = decode_json(body, SaveWeights)
    meta = SaveMeta(
        name=check_name(f"seq-{draft.seq_id}" if asked.path is None else asked.path),
        ttl_s=check_ttl(asked.ttl_seconds, settings),
        overwrite=asked.overwrite,
        user_metadata=check_metadata(asked.user_metadata),
    )
    return replace(draft, meta=to_meta(meta))


def _draft_save_sampler(services: Services, principal: Principal, body: bytes) -> Draft:
    address = decode_json(body, RunAddress)
    draft = run_draft(services, principal, OpKind.SAVE_SAMPLER, address)
    run = services.store.runs.get(principal.tenant_id, RunId(address.model_id))
    return attempt(draft, partial(_fill_save_sampler, services.settings, body, run))


def _fill_save_sampler(settings: Settings, body: bytes, run: RunRow, draft: Draft) -> Draft:
    session_id = run.session_id
    asked = decode_json(body, SaveWeightsForSampler)
    if (asked.path is None) == (asked.sampling_session_seq_id is None):
        raise UserError("save_weights_for_sampler needs a path (a name), or a sampling_session_seq_id, and not both")
    if asked.kind == "inflight" and asked.path is not None:
        raise UserError("an inflight save makes a sampling client and has no name: leave path out, or kind")
    sampler_id = None
    if asked.sampling_session_seq_id is not None:
        sampler_id = SamplerId(f"{session_id}:sample:{asked.sampling_session_seq_id}")
    meta = SaveSamplerMeta(
        name=None if asked.path is None else check_name(asked.path),
        sampler_id=sampler_id,
        session_id=session_id,
        ttl_s=check_ttl(asked.ttl_seconds, settings),
        user_metadata=check_metadata(asked.user_metadata),
        is_inflight=asked.kind == "inflight",
    )
    return replace(draft, meta=to_meta(meta))


def _draft_save_external(services: Services, principal: Principal, body: bytes) -> Draft:
    draft = run_draft(services, principal, OpKind.SAVE_EXTERNAL, decode_json(body, RunAddress))
    run = services.store.runs.get(principal.tenant_id, RunId(str(draft.run_id)))
    num_bytes = services.base(run.spec.base_model).info.adapter_bytes(run.spec)
    return attempt(draft, partial(_fill_save_external, services.settings, principal, body, run, num_bytes))


def _fill_save_external(
    settings: Settings, principal: Principal, body: bytes, run: RunRow, num_bytes: int, draft: Draft
) -> Draft:
    asked = decode_json(body, SaveWeightsExternal)
    recipients = check_recipients(asked.age_encryption_recipients)
    if recipients and num_bytes > MAX_SEALED_BYTES:
        raise UnsupportedError(
            f"{run.run_id} has {num_bytes} bytes of weights, and at most {MAX_SEALED_BYTES} are encrypted here, which "
            "is done in memory: leave out age_encryption_recipients, and encrypt what you download"
        )
    meta = SaveExternalMeta(
        name=check_name(asked.path),
        ttl_s=check_ttl(asked.ttl_seconds, settings),
        recipients=recipients,
        actor=principal.tenant_name,
        actor_key_id=principal.key_id,
    )
    return replace(draft, meta=to_meta(meta))


def _draft_load(services: Services, principal: Principal, body: bytes) -> Draft:
    asked_of = decode_json(body, dict)
    if asked_of.get("session_id") is not None:
        address = decode_json(body, NewRunAddress)
        draft = new_run_draft(services, principal, address)
        return attempt(draft, partial(_fill_create_from, services, principal, address, body))
    draft = run_draft(services, principal, OpKind.LOAD, decode_json(body, RunAddress))
    return attempt(draft, partial(_fill_load, services, principal, body))


def _fill_create_from(
    services: Services, principal: Principal, address: NewRunAddress, body: bytes, draft: Draft
) -> Draft:
    refuse_finished_session(services, principal, address.session_id)
    asked = decode_json(body, LoadWeights)
    found = _loadable(services, principal, asked)
    check_optimizer((asked.optimizer_config or OptimizerConfig()).type)
    if asked.base_model is not None and asked.base_model != found.spec.base_model:
        raise UserError(f"{asked.path} was made on {found.spec.base_model}, not on {asked.base_model[:200]!r}")
    info = services.base(found.spec.base_model).info
    check_lora(found.spec.rank, None, found.spec.targets, services.settings)
    extras = read_extras(check_metadata(asked.user_metadata), services.settings.lora_max_rank)
    extras.require_same(found.spec, found.path)
    spec = replace(found.spec, run_id=RunId(str(draft.run_id)))
    meta = CreateMeta(spec=spec, path=found.path, blob=found.blob, optimizer=asked.optimizer)
    return with_spec(draft, meta, info, asked.user_metadata)


def _fill_load(services: Services, principal: Principal, body: bytes, draft: Draft) -> Draft:
    asked = decode_json(body, LoadWeights)
    found = _loadable(services, principal, asked)
    run = services.store.runs.get(principal.tenant_id, RunId(str(draft.run_id)))
    if _shape(found.spec) != _shape(run.spec):
        raise UserError(
            f"{asked.path} holds an adapter of {shape_text(found.spec)} of {found.spec.base_model}, the run has one of "
            f"{shape_text(run.spec)} of {run.spec.base_model}: make a run with create_training_client_from_state"
        )
    return replace(draft, meta=to_meta(LoadMeta(path=found.path, blob=found.blob, optimizer=asked.optimizer)))


def _loadable(services: Services, principal: Principal, asked: LoadWeights) -> CheckpointRow:
    found = find_checkpoint(services, principal, asked.path, asked.weights_access_token)
    if found.kind is CheckpointKind.EXTERNAL:
        raise UserError(f"{found.path} is for other programs and can't be loaded: load one saved with save_state")
    if asked.optimizer and not found.has_optimizer:
        raise UserError(f"{found.path} holds no optimizer state: load it without, or load one saved with save_state")
    return found


def _shape(spec: RunSpec) -> tuple[object, ...]:
    return spec.base_model, spec.rank, spec.targets, spec.alpha, spec.options
