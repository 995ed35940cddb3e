"""Custom losses: a session uploads a traced function; training requests of that session then name it.

The graph is checked when it arrives and stored as it came; the worker reads it again for each request that names it.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from litestar import post

from tinsmith.api.admission import Promise
from tinsmith.api.auth import Call
from tinsmith.api.body import read_body
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.training import refuse_finished_session, refuse_if_off
from tinsmith.errors import TooLargeError, UserError
from tinsmith.files.blobs import loss_key
from tinsmith.store.rows import NewLoss, NewOp, Principal
from tinsmith.types import Failure, OpId, OpKind, SessionId
from tinsmith.wire.custom_loss import decode_custom_loss
from tinsmith.wire.media import decode_json
from tinsmith.wire.requests import LossAddress
from tinsmith.wire.results import loss_result

MAX_LOSSES = 256  # of one session


@dataclass(frozen=True, slots=True)
class Upload:
    """Exactly one of `name` (of a good loss) and `failure` is set."""

    session_id: SessionId
    loss_id: str
    name: str | None
    failure: Failure | None


@post("/create_custom_loss", status_code=200, request_max_body_size=None)
async def create_custom_loss(request: Call, services: ServicesDep) -> Promise:
    """Upload a loss as a list of torch.fx nodes. Idempotent on its sequence number; a bad one fails its future."""
    body = await read_body(request, services)
    upload = await services.work(_read, services, request.user, body)
    new = None
    if upload.name is not None:
        stored = await services.work(services.blobs.put, loss_key(request.user.tenant_id), body)
        new = NewLoss(loss_id=upload.loss_id, name=upload.name, blob=stored.key)
    op = NewOp(
        tenant_id=request.user.tenant_id,
        kind=OpKind.CREATE_LOSS,
        base_model="",
        id=OpId("req-" + hashlib.sha256(upload.loss_id.encode()).hexdigest()[:32]),
        seq_id=0,
        failure=upload.failure,
        key_id=request.user.key_id,
    )
    result = loss_result(upload.loss_id)
    try:
        enqueued = await services.write(services.store.losses.create, upload.session_id, op, new, result, time.time())
    except UserError:
        if new is not None:
            await services.work(services.blobs.delete, new.blob)
        raise
    if new is not None and not enqueued.is_new:
        await services.work(services.blobs.delete, new.blob)
    return Promise(request_id=enqueued.row.id)


def _read(services: Services, principal: Principal, body: bytes) -> Upload:
    """Raises: WireError: no address. NotFoundError, GoneError: of the session."""
    address = decode_json(body, LossAddress)
    refuse_finished_session(services, principal, address.session_id)
    session_id = SessionId(address.session_id)
    loss_id = f"{session_id}:loss:{address.custom_loss_seq_id}"
    try:
        refuse_if_off(services.settings)
        if services.store.losses.count(session_id) >= MAX_LOSSES:
            raise TooLargeError(f"a session holds at most {MAX_LOSSES} custom losses: use those it has")
        return Upload(session_id, loss_id, decode_custom_loss(body).name, None)
    except UserError as error:
        return Upload(session_id, loss_id, None, error.as_failure())
