"""The OpenAPI document: what the framework reads off the handlers, and what it can't know.

That is the bodies that handlers read themselves, the answers that are no JSON, and the errors in the shape of each
family of routes. A route of the tables that isn't there, or an operation without its entry where it needs one, fails
when the document is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import OpenAPI
from msgspec import Struct

from tinsmith.api.anthropic.body import MessagesBody, PromptBody
from tinsmith.api.dialects import ANTHROPIC_PATH, OPENAI_PATH, AnthropicProblem, OpenAIProblem
from tinsmith.api.errors import Problem
from tinsmith.api.futures import TryAgain
from tinsmith.api.oai.chat import ChatBody
from tinsmith.api.oai.completions import CompletionBody
from tinsmith.api.tokenizers import HubProblem
from tinsmith.wire.custom_loss import LossBody
from tinsmith.wire.media import JSON, PROTOBUF
from tinsmith.wire.requests import (
    CreateModel,
    LoadWeights,
    LossAddress,
    NewRunAddress,
    OptimStep,
    RunAddress,
    SamplerAddress,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
)
from tinsmith.wire.sampling import SampleBody

METHODS = ("get", "head", "post", "put", "delete")
EVENTS = "text/event-stream"
BYTES = "application/octet-stream"
ANYTHING: dict[str, Any] = {}
BINARY = {"type": "string", "format": "binary"}

BODIES: Mapping[str, tuple[type[Struct], ...]] = {  # all of them together
    "/api/v1/create_model": (NewRunAddress, CreateModel),
    "/api/v1/optim_step": (RunAddress, OptimStep),
    "/api/v1/create_custom_loss": (LossAddress, LossBody),
    "/api/v1/save_weights": (RunAddress, SaveWeights),
    "/api/v1/save_weights_for_sampler": (RunAddress, SaveWeightsForSampler),
    "/api/v1/save_weights_external": (RunAddress, SaveWeightsExternal),
    "/api/v1/load_weights": (LoadWeights,),
    "/api/v1/asample": (SamplerAddress, SampleBody),
    "/oai/api/v1/chat/completions": (ChatBody,),
    "/oai/api/v1/completions": (CompletionBody,),
    "/anthropic/api/v1/messages": (MessagesBody,),
    "/anthropic/api/v1/messages/count_tokens": (PromptBody,),
}
ADDRESSES: Mapping[str, tuple[type[Struct], ...]] = {  # one of them beside the body
    "/api/v1/load_weights": (RunAddress, NewRunAddress),
}
OTHER_BODIES: Mapping[str, Mapping[str, Any]] = {  # by media type; they may be left out
    "/api/v1/forward_backward": {PROTOBUF: BINARY},
    "/api/v1/import_weights": {"application/x-tar": BINARY, BYTES: BINARY},
    "/api/v1/telemetry": {JSON: ANYTHING},
    "/api/v1/auth/token": {JSON: ANYTHING},
}
ANSWERS: Mapping[tuple[str, int], Mapping[str, Any]] = {  # by media type; None: no body
    ("/api/v1/retrieve_future", 200): {JSON: ANYTHING, PROTOBUF: BINARY},
    ("/oai/api/v1/chat/completions", 200): {JSON: {"type": "object"}, EVENTS: BINARY},
    ("/oai/api/v1/completions", 200): {JSON: {"type": "object"}, EVENTS: BINARY},
    ("/anthropic/api/v1/messages", 200): {JSON: {"type": "object"}, EVENTS: BINARY},
    ("/anthropic/api/v1/messages/count_tokens", 200): {JSON: {"type": "object"}},
    ("/hf/{path}", 200): {JSON: ANYTHING, BYTES: BINARY},
    ("/api/v1/traces/{file}", 200): {BYTES: BINARY},
    ("/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/archive", 302): {},
    ("/api/v1/downloads/{run_id}/{kind}/{name}/{file}", 200): {
        JSON: ANYTHING,
        "application/x-tar": BINARY,
        BYTES: BINARY,
    },
    ("/api/v1/downloads/{run_id}/{kind}/{name}/{file}", 206): {
        JSON: ANYTHING,
        "application/x-tar": BINARY,
        BYTES: BINARY,
    },
}
PROBLEMS: tuple[type[Struct], ...] = (Problem, OpenAIProblem, AnthropicProblem, HubProblem, TryAgain)
OPEN_STATUSES = (400, 404, 429, 503)
KEY_STATUSES = (401, 410)
BODY_STATUSES = (408, 413)
ADMIN_STATUSES = (403,)
LINK_STATUSES = (403, 410)
RANGE_STATUSES = (416,)


class Document(OpenAPI):
    def to_schema(self) -> dict[str, Any]:
        return completed(super().to_schema())


class DocumentConfig(OpenAPIConfig):
    def to_openapi_schema(self) -> OpenAPI:
        plain = super().to_openapi_schema()
        return Document(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """The framework's document with bodies, answers and errors as they are."""
    paths = document["paths"]
    missing = {*BODIES, *OTHER_BODIES, *(path for path, _ in ANSWERS)} - set(paths)
    if missing:
        raise ValueError(f"there are no such routes: {sorted(missing)}")
    kinds = {kind for kinds in (*BODIES.values(), *ADDRESSES.values()) for kind in kinds}
    _, sent = msgspec.json.schema_components(sorted(kinds, key=repr), ref_template="#/components/schemas/sent.{name}")
    _, problems = msgspec.json.schema_components(PROBLEMS, ref_template="#/components/schemas/{name}")
    schemas = {**document["components"].get("schemas", {}), **problems}
    document["components"]["schemas"] = {**schemas, **{f"sent.{name}": schema for name, schema in sent.items()}}
    for path, operations in paths.items():
        for method in METHODS:
            if method in operations:
                _complete(path, operations[method], is_head=method == "head")
    return document


def _complete(path: str, operation: dict[str, Any], *, is_head: bool) -> None:
    body = _body(path)
    if body is not None:
        operation["requestBody"] = body
    responses = operation["responses"]
    for (of_path, status), content in ANSWERS.items():
        if of_path == path:
            responses[str(status)] = _answer(status, content)
    for status in _statuses(path, has_key="security" in operation, has_body="requestBody" in operation):
        content = {} if status == 408 and path == "/api/v1/retrieve_future" else {JSON: _ref(_problem(path))}
        responses[str(status)] = _answer(status, content or {JSON: {"anyOf": [_ref(Problem), _ref(TryAgain)]}})
    if is_head:
        for response in responses.values():
            response.pop("content", None)


def _body(path: str) -> dict[str, Any] | None:
    if path in OTHER_BODIES:
        return {
            "content": {media: {"schema": schema} for media, schema in OTHER_BODIES[path].items()},
            "required": False,
        }
    if path not in BODIES:
        return None
    parts: list[dict[str, Any]] = [_sent(kind) for kind in BODIES[path]]
    if path in ADDRESSES:
        parts.append({"anyOf": [_sent(kind) for kind in ADDRESSES[path]]})
    schema = parts[0] if len(parts) == 1 else {"allOf": parts}
    return {"content": {JSON: {"schema": schema}}, "required": True}


def _statuses(path: str, *, has_key: bool, has_body: bool) -> list[int]:
    """Of answers that are errors."""
    statuses = [*OPEN_STATUSES]
    statuses += KEY_STATUSES if has_key else ()
    statuses += BODY_STATUSES if has_body else ()
    statuses += ADMIN_STATUSES if "/admin/" in path else ()
    statuses += LINK_STATUSES if "/downloads/" in path or "/traces/" in path else ()
    statuses += RANGE_STATUSES if "/downloads/" in path else ()
    return sorted(statuses)


def _problem(path: str) -> type[Struct]:
    if path.startswith(OPENAI_PATH):
        return OpenAIProblem
    return AnthropicProblem if path.startswith(ANTHROPIC_PATH) else HubProblem if path.startswith("/hf/") else Problem


def _answer(status: int, content: Mapping[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if content:
        answer["content"] = {media: {"schema": schema} for media, schema in content.items()}
    return answer


def _ref(kind: type[Struct]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _sent(kind: type[Struct]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/sent.{kind.__name__}"}
