"""Errors as the clients of each endpoint read them. Below /api/v1 nothing changes; OpenAI and Anthropic have shapes of
their own, which hold for whatever goes wrong below their paths: keys, routes, methods, bodies, faults of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from litestar import Request, Response
from litestar.types import ExceptionHandlersMap
from msgspec import Struct

from tinsmith.api.errors import HANDLERS, Problem, status_of
from tinsmith.errors import TinsmithError

OPENAI_PATH = "/oai/"
ANTHROPIC_PATH = "/anthropic/"
OPENAI_TYPES = {403: "permission_error", 429: "rate_limit_error"}
OPENAI_CODES = {401: "invalid_api_key"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}

Handler = Callable[[Request[Any, Any, Any], Any], Response[Problem]]


class OpenAIFault(Struct):
    """param: the field that is wrong. code: what OpenAI's clients know the case by, else this server's stable code."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIProblem(Struct):
    error: OpenAIFault


class AnthropicFault(Struct):
    """type: Anthropic's. code: this server's stable code."""

    type: str
    message: str
    code: str


class AnthropicProblem(Struct, omit_defaults=True):
    error: AnthropicFault
    type: Literal["error"]
    request_id: str | None = None


def openai_error(problem: Problem, status: int, error: Exception) -> OpenAIProblem:
    kind = OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = getattr(error, "openai_code", None) or OPENAI_CODES.get(status, problem.code)
    return OpenAIProblem(OpenAIFault(problem.detail, kind, getattr(error, "field", None), code))


def anthropic_error(problem: Problem, status: int, request_id: str | None = None) -> AnthropicProblem:
    kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return AnthropicProblem(AnthropicFault(kind, problem.detail, problem.code), "error", request_id)


def problem_of(error: TinsmithError) -> tuple[Problem, int]:
    """For streams that have begun."""
    return Problem(detail=error.message, code=error.code, category=error.category), status_of(error)


def _in_dialect(handler: Handler) -> Callable[[Request[Any, Any, Any], Any], Response[Any]]:
    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
        response: Response[Any] = handler(request, error)
        problem: Problem = response.content
        status = response.status_code or 500
        if request.url.path.startswith(OPENAI_PATH):
            response.content = openai_error(problem, status, error)
        elif request.url.path.startswith(ANTHROPIC_PATH):
            request_id: Any = request.scope.get("request_id")
            response.content = anthropic_error(problem, status, request_id)
        return response

    return answer


HANDLERS_BY_PATH: ExceptionHandlersMap = {kind: _in_dialect(handler) for kind, handler in HANDLERS.items()}
