"""The search for sessions."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Literal

from litestar import post
from litestar.params import JSONBody
from msgspec import Meta, Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import iso_time
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.tokens import user_urn
from tinsmith.store.rows import Principal, SessionRow
from tinsmith.store.session_search import NO_PROJECT, FoundSession, SessionFilter
from tinsmith.types import SessionId
from tinsmith.validate.requests import check_metadata

Text = Annotated[str, Meta(max_length=512)]
Reason = Literal["success", "errored", "interrupted"]
REASONS: tuple[Reason, ...] = ("success", "errored", "interrupted")


class Own(Struct, tag="own", frozen=True):
    pass


class Accessible(Struct, tag="accessible"):
    pass


class OfUsers(Struct, tag="user"):
    owner_urns: Annotated[list[Text], Meta(min_length=1, max_length=10)]


class IsActive(Struct, tag="active"):
    pass


class IsCancelled(Struct, tag="cancelled"):
    pass


class IsFailed(Struct, tag="failed"):
    pass


class IsFinished(Struct, tag="client_finished"):
    reasons: Annotated[list[Reason], Meta(min_length=1, max_length=3)] | None = None


class SearchCursor(Struct):
    last_created_at: Annotated[datetime, Meta(tz=True)]
    last_session_id: Text


class SearchSessions(Struct):
    session_id: Text | None = None
    project_ids: Annotated[list[Text], Meta(max_length=1000)] | None = None
    user_metadata: Annotated[dict[Text, Text], Meta(max_length=64)] = {}
    display_name: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    owner: Own | Accessible | OfUsers = Own()
    statuses: (
        Annotated[list[IsActive | IsCancelled | IsFailed | IsFinished], Meta(min_length=1, max_length=16)] | None
    ) = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


class FinishedFor(Struct):
    type: str


class Status(Struct, omit_defaults=True):
    """type: active, or client_finished with a reason."""

    type: str
    reason: FinishedFor | None = None
    detail: str | None = None


class SessionSummary(Struct, omit_defaults=True):
    """status is missing for a session that fell silent. project_id is empty for one that is in none."""

    session_id: str
    created_at: str
    owner: str
    project_id: str
    checkpoints_count: int
    checkpoint_storage_bytes: int
    status: Status | None = None
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None


class NextCursor(Struct):
    last_created_at: str
    last_session_id: str


class SessionPage(Struct, omit_defaults=True):
    sessions: list[SessionSummary]
    next_cursor: NextCursor | None = None


@post("/sessions/search", status_code=200)
async def search_sessions(request: Call, services: ServicesDep, data: JSONBody[SearchSessions]) -> SessionPage:
    """The caller's sessions that fit all filters, newest first. A tenant is one user: what is accessible is its own."""
    return await services.work(_search, services, request.user, data)


def _search(services: Services, principal: Principal, asked: SearchSessions) -> SessionPage:
    urn = user_urn(principal.tenant_id)
    if isinstance(asked.owner, OfUsers) and urn not in asked.owner.owner_urns:
        return SessionPage([])
    after = None
    if asked.cursor is not None:
        after = (asked.cursor.last_created_at.timestamp(), SessionId(asked.cursor.last_session_id))
    found = services.store.session_search.page(principal.tenant_id, _filter(asked), after, asked.limit + 1, time.time())
    page = found[: asked.limit]
    last = page[-1].row if len(found) > asked.limit else None
    return SessionPage(
        [_summary(urn, session) for session in page],
        None if last is None else NextCursor(iso_time(last.created_at), last.session_id),
    )


def _filter(asked: SearchSessions) -> SessionFilter:
    is_active = reasons = None
    if asked.statuses is not None:
        is_active = any(isinstance(status, IsActive) for status in asked.statuses)
        finished = [status for status in asked.statuses if isinstance(status, IsFinished)]
        reasons = [reason for status in finished for reason in status.reasons or REASONS]
    return SessionFilter(
        session_id=asked.session_id,
        name=asked.display_name,
        project_ids=asked.project_ids,
        user_metadata=asked.user_metadata,
        is_active=is_active,
        reasons=reasons,
    )


def _summary(urn: str, found: FoundSession) -> SessionSummary:
    row = found.row
    return SessionSummary(
        session_id=row.session_id,
        created_at=iso_time(row.created_at),
        owner=urn,
        project_id=row.project_id or NO_PROJECT,
        checkpoints_count=found.num_checkpoints,
        checkpoint_storage_bytes=found.checkpoint_bytes,
        status=_status(row),
        display_name=row.display_name,
        user_metadata=check_metadata(row.user_metadata) or None,
    )


def _status(row: SessionRow) -> Status | None:
    if row.finished_at is None:
        return Status("active")
    if row.finish_reason in REASONS:
        return Status("client_finished", FinishedFor(row.finish_reason), row.finish_detail)
    return None
