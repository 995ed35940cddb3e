"""Sessions: the lifetime of one client process. They end by `finish` or by silence."""

from __future__ import annotations

import asyncio
import time

import msgspec
from litestar import get, post, put
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import AccessScope, Limit, Offset
from tinsmith.api.services import Services, ServicesDep
from tinsmith.errors import UserError
from tinsmith.store.rows import Principal
from tinsmith.types import SessionId
from tinsmith.validate.requests import check_metadata
from tinsmith.wire.requests import AssignProject, CreateSession, FinishSession, SessionHeartbeat

MAX_TEXT = 512
REASONS = ("success", "errored", "interrupted")
# Between the last answers to a session's polls and that of its end. On Python before 3.12 the SDK's closing waits for
# ever if it cancels a poll in the very moment in which its answer has come (pyqwest.httpx awaits it by wait_for, which
# loses the cancellation, bpo-37658): to go with support for 3.11 by the SDK.
FINISH_PAUSE_S = 0.1


class SessionCreated(Struct):
    session_id: str
    type: str = "create_session"


class Beat(Struct):
    type: str = "session_heartbeat"


class Finished(Struct):
    status: str = "finished"


class SessionList(Struct):
    sessions: list[str]


class SessionInfo(Struct, omit_defaults=True):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


@post("/create_session", status_code=200)
async def create_session(request: Call, services: ServicesDep, data: JSONBody[CreateSession]) -> SessionCreated:
    texts = [*data.tags, data.sdk_version, data.project_id or "", data.display_name or ""]
    if len(data.tags) > 64 or any(len(text) > MAX_TEXT for text in texts):
        raise UserError(f"a session takes at most 64 tags, and texts of at most {MAX_TEXT} characters")
    services.disk.take(request.user.tenant_id, len(msgspec.json.encode(data)))
    row = await services.write(
        services.store.sessions.create,
        request.user.tenant_id,
        tags=tuple(data.tags),
        user_metadata=check_metadata(data.user_metadata),
        sdk_version=data.sdk_version,
        project_id=data.project_id,
        display_name=data.display_name,
        by=request.user,
        most=services.settings.max_sessions,
    )
    return SessionCreated(session_id=row.session_id)


@post("/session_heartbeat", status_code=200)
async def session_heartbeat(request: Call, services: ServicesDep, data: JSONBody[SessionHeartbeat]) -> Beat:
    """410 once the session has ended: the client stops sending. A key of a scope less than full keeps those sessions
    alive that it opened."""
    user = request.user
    await services.write(services.store.sessions.beat, user.tenant_id, SessionId(data.session_id), time.time(), by=user)
    return Beat()


@post("/sessions/{session_id:str}/finish", status_code=200)
async def finish_session(
    request: Call, services: ServicesDep, session_id: FromPath[str], data: JSONBody[FinishSession]
) -> Finished:
    """The first finish wins; later ones change nothing and succeed too. Samples that wait or run are cancelled. A key
    of a scope less than full ends the sessions that it opened.

    Answered after `FINISH_PAUSE_S`, when answers to the session's polls have long been read.
    """
    if data.reason.type not in REASONS:
        raise UserError(f"reason.type is one of {', '.join(REASONS)}")
    cancelled = await services.write(
        services.store.sessions.finish,
        request.user.tenant_id,
        SessionId(session_id),
        data.reason.type,
        None if data.detail is None else data.detail[:4096],
        time.time(),
        by=request.user,
    )
    for base_model in cancelled:
        services.ring(base_model)
    services.waiters.ring()
    await asyncio.sleep(FINISH_PAUSE_S)
    return Finished()


@get("/sessions")
async def list_sessions(
    request: Call,
    services: ServicesDep,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> SessionList:
    rows, _ = await services.work(services.store.sessions.list, request.user.tenant_id, limit, offset)
    return SessionList(sessions=[row.session_id for row in rows])


@get("/sessions/{session_id:str}")
async def get_session(
    request: Call, services: ServicesDep, session_id: FromPath[str], access_scope: AccessScope = "owned"
) -> SessionInfo:
    return await services.work(_info, services, request.user, SessionId(session_id))


@put("/sessions/{session_id:str}/project", status_code=204)
async def assign_project(
    request: Call, services: ServicesDep, session_id: FromPath[str], data: JSONBody[AssignProject]
) -> None:
    """Move a session with its runs and samplers into a project; there is no way out of projects."""
    await services.write(
        services.store.sessions.set_project,
        request.user.tenant_id,
        SessionId(session_id),
        data.project_id,
        request.user,
        time.time(),
    )


def _info(services: Services, principal: Principal, session_id: SessionId) -> SessionInfo:
    row = services.store.sessions.get(principal.tenant_id, session_id)
    run_ids, sampler_ids = services.store.sessions.children(principal.tenant_id, session_id)
    return SessionInfo(
        training_run_ids=list(run_ids),
        sampler_ids=list(sampler_ids),
        user_metadata=check_metadata(row.user_metadata),
        display_name=row.display_name,
    )
