"""copy_weights: a checkpoint, one's own or one that may be read, under a new path that is one's own."""

from __future__ import annotations

import time

from litestar import post
from litestar.params import JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.sharing import find_checkpoint
from tinsmith.api.training import refuse_finished_session
from tinsmith.errors import UserError
from tinsmith.store.files import ROW_BYTES
from tinsmith.store.rows import NewCopy, Principal
from tinsmith.types import SessionId
from tinsmith.validate.requests import check_ttl
from tinsmith.wire.requests import CopyWeights

TOKEN_HEADER = "x-tinker-weights-access-token"
KEY_HEADER = "x-idempotency-key"
MAX_KEY_CHARS = 256


class CopiedWeights(Struct):
    tinker_path: str


@post("/copy_weights", status_code=200)
async def copy_weights(request: Call, services: ServicesDep, data: JSONBody[CopyWeights]) -> CopiedWeights:
    """Copy a checkpoint into a project. The file is shared; the copy has a run of its own, which can't be trained."""
    token = data.weights_access_token or request.headers.get(TOKEN_HEADER)
    key = request.headers.get(KEY_HEADER)
    new = await services.work(_draft, services, request.user, data, token, key)
    services.disk.take(
        request.user.tenant_id, 2 * ROW_BYTES
    )  # beside the checkpoint's row those of its run and session
    return CopiedWeights(
        tinker_path=await services.write(
            services.store.copies.create, new, time.time(), most_sessions=services.settings.max_sessions
        )
    )


def _draft(
    services: Services, principal: Principal, asked: CopyWeights, token: str | None, request_key: str | None
) -> NewCopy:
    check_ttl(asked.ttl_seconds, services.settings)
    has_place = asked.session_id is not None and asked.model_seq_id is not None
    if has_place == (asked.destination_project_id is not None) or (asked.session_id is not None) != has_place:
        raise UserError("copy_weights needs a destination_project_id, or a session_id and a model_seq_id, and not both")
    if request_key is not None and len(request_key) > MAX_KEY_CHARS:
        raise UserError(f"X-Idempotency-Key is longer than {MAX_KEY_CHARS} characters: use a UUID")
    if asked.session_id is not None:
        refuse_finished_session(services, principal, asked.session_id)
    source = find_checkpoint(services, principal, asked.source_path, token)
    return NewCopy(
        tenant_id=principal.tenant_id,
        source=source,
        by=principal,
        project_id=asked.destination_project_id,
        session_id=None if asked.session_id is None else SessionId(asked.session_id),
        model_seq_id=asked.model_seq_id or 0,
        request_key=request_key,
        expires_at=None if asked.ttl_seconds is None else time.time() + asked.ttl_seconds,
        keeps_metadata=source.tenant_id == principal.tenant_id,
    )
