"""The one way into the queue: payload file first, then the row, then the bell, then the answer.

Never waits for ordering. A well-addressed request is always admitted: a bad one as an op that has failed already, so
that its seq_id is consumed and its future says why. A duplicate gets the first op.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from uuid import uuid4

from msgspec import Struct

from tinsmith.api.marks import bind_op
from tinsmith.api.services import Services
from tinsmith.crashpoints import crash_point
from tinsmith.errors import CapacityError, UserError
from tinsmith.files.blobs import payload_key
from tinsmith.observe import tracing
from tinsmith.observe.series import FAILED_OPS, OPS
from tinsmith.store.quota_rules import SAVED_PARTS
from tinsmith.store.rows import Enqueued, NewOp, NewRun, OpRow, Principal
from tinsmith.types import BlobKey, Failure, OpId, OpKind, RunId, SamplerId, TenantId
from tinsmith.wire.media import JSON

NUM_SNAPSHOTS = 2  # of a run: the newest, and the one before


class Promise(Struct, omit_defaults=True):
    """The answer to every request that is carried out later; its result is fetched with retrieve_future."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """An op as its resource knows it.

    run: the run that a CREATE op makes, unless it fails. op_id: its id, where that has to be known before.
    """

    kind: OpKind
    base_model: str
    seq_id: int
    run_id: RunId | None = None
    sampler_id: SamplerId | None = None
    cost_tokens: int = 0
    payload: bytes | None = None
    media: str = JSON
    meta: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    run: NewRun | None = None
    op_id: OpId | None = None


def new_op_id() -> OpId:
    return OpId(f"req-{uuid4().hex}")


def rejected(draft: Draft, error: UserError) -> Draft:
    """The same op, born failed."""
    return replace(draft, payload=None, failure=error.as_failure())


def attempt(draft: Draft, fill: Callable[[Draft], Draft]) -> Draft:
    """`fill` completes an addressed draft; a mistake of the user that it finds makes the draft a rejected one.

    A draft that was rejected at its address already stays as it is.
    """
    if draft.failure is not None:
        return draft
    try:
        return fill(draft)
    except UserError as error:
        return rejected(draft, error)


async def admit(services: Services, principal: Principal, draft: Draft) -> OpRow:
    """Record the op and wake its worker; returns its row, or that of the first op with the same seq_id.

    One that is larger than a quota becomes a rejected one. A payload file is deleted only where its row surely isn't
    there: after other errors it may be.

    Raises:
        NotFoundError: the run, sampler or session isn't the tenant's.
        StorageFullError: there is no room for it on the disk.
        CapacityError: as many requests on the tenant's runs as may wait do already.
    """
    draft = attempt(draft, partial(_fitting, services, principal))
    async with _room_for_training(services, principal, draft):
        return await _admit(services, principal, draft)


async def refuse_when_full(services: Services, tenant_id: TenantId, run_id: RunId, seq_id: int) -> None:
    """Before a request on a run is read: what needn't be, since there was no room for it a moment ago.

    Raises:
        CapacityError: as many as may wait do already.
    """
    try:
        services.training_room.refuse_known(tenant_id)
    except CapacityError:
        if not await services.work(services.store.loads.is_awaited, run_id, seq_id):
            raise


@asynccontextmanager
async def _room_for_training(services: Services, principal: Principal, draft: Draft) -> AsyncIterator[None]:
    """Around the recording of what waits on a run. Requests that came early never keep out the one they wait for."""
    if draft.failure is not None or draft.run_id is None:
        yield
        return
    room, tenant_id, num_bytes = services.training_room, principal.tenant_id, len(draft.payload or b"")
    if not room.take_known(tenant_id, num_bytes):
        try:
            await services.work(room.take, tenant_id, num_bytes)
        except CapacityError:
            if not await services.work(services.store.loads.is_awaited, draft.run_id, draft.seq_id):
                raise
            yield
            return
    with room.coming(tenant_id, num_bytes):
        yield


async def _admit(services: Services, principal: Principal, draft: Draft) -> OpRow:
    op_id = draft.op_id or new_op_id()
    made = await _bytes_made(services, draft) if draft.failure is None else 0
    services.disk.take(principal.tenant_id, len(draft.payload or b"") + made)
    blob = await _write_payload(services, principal, op_id, draft.payload)
    new = NewOp(
        tenant_id=principal.tenant_id,
        kind=draft.kind,
        base_model=draft.base_model,
        id=op_id,
        seq_id=draft.seq_id,
        run_id=draft.run_id,
        sampler_id=draft.sampler_id,
        cost_tokens=draft.cost_tokens,
        payload=None if blob else draft.payload,
        payload_blob=blob,
        payload_bytes=len(draft.payload or b""),
        media=draft.media,
        meta=tracing.carry(draft.meta),
        failure=draft.failure,
        key_id=principal.key_id,
    )
    looks_before = services.waiters.num_looks
    try:
        enqueued = await _record(services, new, draft.run)
    except UserError:
        if blob:
            await services.work(services.blobs.delete, blob)
        raise
    if enqueued.is_new and draft.failure is not None:
        OPS.add(draft.kind, "refused")
        FAILED_OPS.add(draft.failure.code)
    if blob and not enqueued.is_new:
        await services.work(services.blobs.delete, blob)
    bind_op(enqueued.row)
    if not enqueued.row.state.is_final:
        if services.waiters.num_looks == looks_before:
            services.recent.opened(enqueued.row)
        services.ring(enqueued.row.base_model, enqueued.row if enqueued.is_new and draft.run is None else None)
    return enqueued.row


async def _bytes_made(services: Services, draft: Draft) -> int:
    """Of the files that it makes: a save's checkpoint, two snapshots of a new run."""
    if draft.run is not None:
        return draft.run.adapter_bytes * SAVED_PARTS[OpKind.SAVE] * NUM_SNAPSHOTS
    if draft.run_id is None or not draft.kind.is_save:
        return 0
    return await services.work(services.store.quotas.saved_bytes, draft.kind, draft.run_id)


def _fitting(services: Services, principal: Principal, draft: Draft) -> Draft:
    """Raises: QuotaError: it alone is larger than a quota."""
    new_bytes = 0 if draft.run is None else draft.run.adapter_bytes
    services.store.quotas.require_fit(principal, draft.kind, draft.cost_tokens, draft.run_id, new_bytes)
    return draft


async def _record(services: Services, new: NewOp, run: NewRun | None) -> Enqueued:
    if run is not None:
        return await services.write(services.store.ops.create_run, run, new, time.time())
    return await services.enqueue(new)


async def _write_payload(
    services: Services, principal: Principal, op_id: OpId, payload: bytes | None
) -> BlobKey | None:
    if payload is None or len(payload) <= services.settings.inline_bytes:
        return None
    stored = await services.work(services.blobs.put, payload_key(principal.tenant_id, op_id), payload)
    crash_point("api.after_payload_file")
    return stored.key
