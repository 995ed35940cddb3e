"""import_weights: an adapter or a run's state from elsewhere becomes checkpoints of the caller's.

The body goes to a file without a name as it comes in, of at most what the base's largest adapter could need, or a full
run where these are offered. It is
looked at there, one tensor after another, in a thread of its own; what comes of it is written like any checkpoint, and
only then do its rows come to be. So an import that was answered is there whatever happens next, and one that wasn't
leaves nothing but a file without a row, which the janitor takes away.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import replace
from functools import partial
from typing import Annotated, BinaryIO

from litestar import post
from litestar.params import FromQuery, QueryParameter
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.copies import KEY_HEADER, MAX_KEY_CHARS
from tinsmith.api.intake import hold_of
from tinsmith.api.outgo import closing_with
from tinsmith.api.services import Services, ServicesDep
from tinsmith.bases.layer_table import read_layers
from tinsmith.bases.weight_table import Shapes, read_weights
from tinsmith.errors import BusyError, TooLargeError, UserError
from tinsmith.files.blobs import BlobInfo, checkpoint_key
from tinsmith.importing.look import look
from tinsmith.store.copies import own_session_id
from tinsmith.store.imports import DIGEST, NewImport
from tinsmith.store.rows import NewCheckpoint, NewRun, Principal
from tinsmith.types import BaseInfo, CheckpointKind, RunId, RunSpec, Targets
from tinsmith.validate.lora_fields import check_extras
from tinsmith.validate.requests import check_lora, check_ttl
from tinsmith.wire.paths import check_name

PIECE_BYTES = 4 << 20  # written at one time
SPARE_BYTES = 64 << 20  # for headers and whatever else is in an archive
PARTS = 3  # of a state: weights and both moments
EXPANSION = 2  # of experts, whose shared factors others repeat for each
MAX_PROJECT_CHARS = 256


class ImportedWeights(Struct):
    """path: to go on training from. sampler_path: the same weights, to sample from."""

    path: str
    sampler_path: str
    base_model: str
    lora_rank: int
    has_optimizer: bool
    size_bytes: int


class Plan(Struct, frozen=True):
    """What was asked for, checked. at_most: bytes of the body."""

    base: BaseInfo
    name: str
    ttl_s: int | None
    project_id: str | None
    request_key: str | None
    at_most: int


@post("/import_weights", status_code=200, request_max_body_size=None)
async def import_weights(
    request: Call,
    services: ServicesDep,
    base_model: FromQuery[str | None] = None,
    name: FromQuery[str] = "imported",
    ttl_seconds: FromQuery[int | None] = None,
    project_id: Annotated[str | None, QueryParameter(max_length=MAX_PROJECT_CHARS)] = None,
) -> ImportedWeights:
    """Make checkpoints of a PEFT adapter, or of the state of a run that was downloaded from another server.

    The body is an uncompressed tar with adapter_config.json and adapter_model.safetensors, or run_state.safetensors.
    """
    key = request.headers.get(KEY_HEADER)
    plan = await services.work(_plan, services, request.user, base_model, name, ttl_seconds, project_id, key)
    tenant_id = request.user.tenant_id
    length = request.content_length or 0
    if length > plan.at_most:
        raise _too_large(plan)
    place = await services.imports_in.try_take(tenant_id, 0.0)
    if place is None:
        raise BusyError("weights are being imported by this tenant, or by as many others as may: try again later")
    closing = closing_with(request.scope)
    closing.callback(services.imports_in.give_back, place)
    body = await services.work(services.blobs.scratch)
    closing.callback(body.close)
    num_bytes, digest = await _take_in(request, services, body, plan)
    ask = partial(_make, services, request.user, plan, body, num_bytes, digest)
    new, has_optimizer = await asyncio.get_running_loop().run_in_executor(services.importing, ask)
    most = services.settings.max_sessions
    if not await services.write(services.store.imports.create, new, time.time(), most_sessions=most):
        await services.work(services.blobs.delete, new.checkpoints[0].blob)
    training, sampler = (f"tinker://{each.run_id}/{each.kind}/{each.name}" for each in new.checkpoints)
    spec = new.run.spec
    return ImportedWeights(training, sampler, spec.base_model, spec.rank, has_optimizer, new.checkpoints[0].size_bytes)


def _plan(
    services: Services,
    principal: Principal,
    base_model: str | None,
    name: str,
    ttl_seconds: int | None,
    project_id: str | None,
    request_key: str | None,
) -> Plan:
    check_name(name)
    if request_key is not None and len(request_key) > MAX_KEY_CHARS:
        raise UserError(f"X-Idempotency-Key is longer than {MAX_KEY_CHARS} characters: use a UUID")
    if base_model is None:
        if len(services.bases) != 1:
            raise UserError(f"several base models are served: say base_model, one of {', '.join(services.bases)}")
        (base_model,) = services.bases
    base = services.base(base_model).info
    services.store.quotas.require_storage(principal, 1, time.time())
    largest = base.adapter_bytes(RunSpec(RunId(""), base.name, rank=services.settings.lora_max_rank))
    full = base.adapter_bytes(RunSpec(RunId(""), base.name, rank=0)) if services.settings.full_fine_tuning else 0
    at_most = PARTS * max(EXPANSION * largest, full) + SPARE_BYTES
    return Plan(base, name, check_ttl(ttl_seconds, services.settings), project_id, request_key, at_most)


async def _take_in(request: Call, services: Services, body: BinaryIO, plan: Plan) -> tuple[int, str]:
    """(bytes, their SHA-256 in hex) of what came in, which is in `body` now.

    Raises:
        TooLargeError: it is more than the base's largest adapter could need.
        StorageFullError: there is no room on the disk.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UserError("weights are sent as they are, without a content-encoding: they don't get smaller by it")
    hold, digest, pieces, num_bytes, waiting = hold_of(request.scope), hashlib.sha256(), bytearray(), 0, 0

    def write(data: bytes) -> None:
        services.disk.take(request.user.tenant_id, 2 * len(data))  # here, and in the checkpoint
        body.write(data)
        digest.update(data)

    async for piece in request.stream():
        num_bytes, waiting = num_bytes + len(piece), waiting + len(piece)
        if num_bytes > plan.at_most:
            raise _too_large(plan)
        pieces += piece
        if waiting >= PIECE_BYTES:
            await services.work(write, bytes(pieces))
            pieces.clear()
            hold.give_back(waiting)
            waiting = 0
    await services.work(write, bytes(pieces))
    return num_bytes, digest.hexdigest()


def _make(
    services: Services, principal: Principal, plan: Plan, body: BinaryIO, num_bytes: int, digest: str
) -> tuple[NewImport, bool]:
    """(the import, whether it has moments), its file on disk.

    Raises:
        UserError: what was sent can't be carried, or doesn't fit the base.
    """
    layers = read_layers(services.settings.data_dir, plan.base.name)
    full_weights = partial(_full_weights, services, plan)
    found = look(body, num_bytes, layers, plan.base, full_weights)
    for rank in (found.spec.rank, *dict(found.spec.options.ranks).values()):
        check_lora(rank, found.spec.seed, found.spec.targets, services.settings)
    check_extras(found.spec, plan.base)
    run = _run(principal, plan, found.spec, digest)
    services.store.quotas.require_storage(principal, 2 * found.num_bytes, time.time())
    stored = services.blobs.put(checkpoint_key(principal.tenant_id), found.pieces(run.spec))
    expires_at = None if plan.ttl_s is None else time.time() + plan.ttl_s
    kinds = (CheckpointKind.TRAINING, found.has_optimizer), (CheckpointKind.SAMPLER, False)
    checkpoints = [_checkpoint(run, kind, plan.name, stored, expires_at, has) for kind, has in kinds]
    return NewImport(run, checkpoints, principal, plan.project_id), found.has_optimizer


def _full_weights(services: Services, plan: Plan) -> Shapes:
    """Raises: UserError: full fine-tuning isn't offered."""
    check_lora(0, None, Targets(), services.settings)
    return read_weights(services.settings.data_dir, plan.base.name)


def _run(principal: Principal, plan: Plan, like: RunSpec, digest: str) -> NewRun:
    session_id = own_session_id(principal.tenant_id, None if plan.request_key is None else f"import {plan.request_key}")
    run_id = RunId(f"{session_id}:train:0")
    spec = replace(like, run_id=run_id, base_model=plan.base.name)
    return NewRun(principal.tenant_id, session_id, 0, spec, {DIGEST: digest}, plan.base.adapter_bytes(spec))


def _checkpoint(
    run: NewRun, kind: CheckpointKind, name: str, stored: BlobInfo, expires_at: float | None, has_optimizer: bool
) -> NewCheckpoint:
    return NewCheckpoint(
        run_id=run.spec.run_id,
        kind=kind,
        name=name,
        blob=stored.key,
        size_bytes=stored.size,
        sha256=stored.sha256,
        expires_at=expires_at,
        has_optimizer=has_optimizer,
    )


def _too_large(plan: Plan) -> TooLargeError:
    return TooLargeError(
        f"the weights are larger than {plan.at_most} bytes, which is more than the state of the largest adapter on "
        f"{plan.base.name} (--lora-max-rank): they are of another model"
    )
