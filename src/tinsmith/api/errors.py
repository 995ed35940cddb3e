"""From the exception tree to one JSON shape: {"detail", "code", "category"}.

Never 409 or 402, which clients retry for minutes, and never a body without a word. A traceback goes to the log, not to
the client.
"""

from __future__ import annotations

import errno
from typing import Any

import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap
from msgspec import Struct

from tinsmith.errors import (
    AuthError,
    BusyError,
    CapacityError,
    ForbiddenError,
    GoneError,
    NotFoundError,
    RequestTimeoutError,
    StorageFullError,
    TinsmithError,
    TokenError,
    TooLargeError,
    UserError,
    echo,
)
from tinsmith.observe.series import REFUSED

log = structlog.get_logger("tinsmith.api")

RETRY_AFTER_S = 5
TURNED_AWAY = "turned_away"  # in the state of the app
STATUSES: tuple[tuple[type[TinsmithError], int], ...] = (
    (AuthError, 401),
    (ForbiddenError, 403),
    (NotFoundError, 404),
    (GoneError, 410),
    (RequestTimeoutError, 408),
    (TooLargeError, 413),
    (UserError, 400),
    (StorageFullError, 503),
    (BusyError, 503),
    (CapacityError, 429),
)
CODES = {401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class Problem(Struct):
    """The body of every answer that is an error. `category`: user, capacity or server."""

    detail: str
    code: str
    category: str


def status_of(error: TinsmithError) -> int:
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def answer_ours(request: Request[Any, Any, Any], error: TinsmithError) -> Response[Problem]:
    status, headers, problem = refusal(request.url.path, error)
    if request.scope.get("user") is not None:
        request.app.state[TURNED_AWAY].note(request.user.tenant_id, request.url.path, status)
    return Response(problem, status_code=status, headers=headers)


def refusal(path: str, error: TinsmithError) -> tuple[int, dict[str, str], Problem]:
    """(status, headers, body) of an answer to a request of `path`; a fault of ours is logged."""
    status = status_of(error)
    REFUSED.add(error.code)
    headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    if status == 408:
        headers["connection"] = "close"
    if status == 401:
        is_token = isinstance(error, TokenError)  # clients exchange their key for another one, and ask again
        headers["www-authenticate"] = 'Bearer error="invalid_token"' if is_token else "Bearer"
    if isinstance(error, CapacityError) and status >= 500:  # no fault: a line each, however many there are
        log.error("request failed", path=path, code=error.code, reason=error.message)
    elif status >= 500:
        log.error("request failed", path=path, code=error.code, exc_info=error)
    return status, headers, Problem(detail=error.message, code=error.code, category=error.category)


def answer_framework(request: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    """What the framework refuses by itself: unknown routes, methods, malformed parameters and bodies."""
    status = 400 if error.status_code in (402, 409) else error.status_code
    if status >= 500:
        return answer_unknown(request, error)
    detail = error.detail or "bad request"
    if status == 404:
        detail = f"there is nothing at {request.method} {echo(request.url.path)}"
    elif status == 413:
        detail = "the request body is larger than this route takes: shorten it"
    reasons = "; ".join(
        str(item.get("message", item)) if isinstance(item, dict) else str(item) for item in _extra(error)
    )
    problem = Problem(
        detail=f"{detail}: {reasons}" if reasons else detail,
        code=CODES.get(status, UserError.code),
        category="user",
    )
    REFUSED.add(problem.code)
    return Response(problem, status_code=status)


def answer_system(request: Request[Any, Any, Any], error: OSError) -> Response[Problem]:
    """A fault of the machine."""
    lack = lack_of(error)
    return answer_unknown(request, error) if lack is None else answer_ours(request, lack)


def lack_of(error: Exception) -> TinsmithError | None:
    """What an error of the machine means to a client, where it is a lack that passes."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return BusyError("the server has as many files open as it may: send the request again")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError("the disk is full: free space, then send the request again")
    return None


def answer_unknown(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    request_id: Any = request.scope.get("request_id", "")
    return Response(fault(request.url.path, request_id, error), status_code=500)


def fault(path: str, request_id: str, error: Exception) -> Problem:
    """The body of an answer to a request on which the server failed; the error is logged."""
    log.error("request failed", path=path, exc_info=error)
    REFUSED.add(TinsmithError.code)
    detail = f"internal error; the server's log has the details under request id {request_id}"
    return Problem(detail=detail, code=TinsmithError.code, category="server")


HANDLERS: ExceptionHandlersMap = {
    TinsmithError: answer_ours,
    HTTPException: answer_framework,
    OSError: answer_system,
    Exception: answer_unknown,
}


def _extra(error: HTTPException) -> list[Any]:
    extra = error.extra
    if not extra:
        return []
    return extra if isinstance(extra, list) else [extra]
