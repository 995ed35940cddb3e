"""The route table, and the one piece of ASGI around it: a request id, a log line, security headers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import structlog
from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.di import Provide
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith.api import (
    audit,
    billing,
    capabilities,
    client,
    copies,
    downloads,
    endings,
    futures,
    identity,
    imports,
    keys,
    losses,
    metrics,
    quotas,
    reference,
    runs,
    sampling,
    search,
    sessions,
    sharing,
    tenant_weights,
    tokenizers,
    traces,
    training,
    weights,
)
from tinsmith.api.access import NEEDS, scope_guard
from tinsmith.api.anthropic import messages
from tinsmith.api.auth import KeyCache, key_guard, key_itself_guard
from tinsmith.api.body import PLAIN_BYTES, JsonRequest
from tinsmith.api.dialects import HANDLERS_BY_PATH
from tinsmith.api.errors import TURNED_AWAY, Problem, status_of
from tinsmith.api.guesses import Guesses
from tinsmith.api.intake import TOTAL_BODIES, Budget, with_intake
from tinsmith.api.marks import is_host, log_request, request_id_of, security_headers
from tinsmith.api.oai import chat, completions, models
from tinsmith.api.outgo import Unread, with_outgo
from tinsmith.api.rates import ACTS_PER_MINUTE, Rate, act_guard
from tinsmith.api.services import Services
from tinsmith.api.texts.room import Room
from tinsmith.api.tokens import PREFIX, Tokens
from tinsmith.api.waiters import Awaited, Ended
from tinsmith.errors import UserError
from tinsmith.observe import tracing
from tinsmith.store.end_rows import EndsAfter
from tinsmith.wire.media import JSON, encode_json

KEYS, BUDGET = "keys", "budget"  # in the state of the app: what the express lane shares with it
OPEN = (  # and /schema, the OpenAPI document and its page
    Router("/api/v1", route_handlers=[capabilities.healthz]),
    downloads.download,
    tokenizers.hub_file,
    traces.fetch_trace,
    reference.asset,
    reference.start,
)
CLOSED = (
    client.client_config,
    client.dynamic_config,
    client.telemetry,
    sessions.create_session,
    sessions.session_heartbeat,
    sessions.finish_session,
    sessions.list_sessions,
    sessions.get_session,
    sessions.assign_project,
    search.search_sessions,
    traces.export_trace,
    identity.exchange_token,
    identity.get_own_key,
    identity.delete_own_key,
    audit.get_audit,
    billing.get_usage,
    billing.get_storage,
    capabilities.get_server_capabilities,
    training.create_model,
    training.get_info,
    training.forward_backward,
    training.optim_step,
    losses.create_custom_loss,
    weights.save_weights,
    weights.save_weights_for_sampler,
    weights.save_weights_external,
    weights.load_weights,
    weights.weights_info,
    sampling.create_sampling_session,
    sampling.get_sampler,
    sampling.asample,
    sampling.join_sampling_session,
    futures.retrieve_future,
    endings.retrieve_futures,
    endings.cancel_future,
    runs.list_runs,
    runs.get_run,
    runs.delete_run,
    runs.list_run_checkpoints,
    runs.list_checkpoints,
    runs.delete_checkpoint,
    runs.set_checkpoint_ttl,
    sharing.publish,
    sharing.unpublish,
    sharing.create_access_token,
    copies.copy_weights,
    imports.import_weights,
    downloads.archive,
    downloads.external_weights_urls,
)
OPENAI = (models.list_models, models.get_model, chat.create_chat_completion, completions.create_completion)
ANTHROPIC = (messages.create_message, messages.count_message_tokens)
ADMIN = (
    keys.create_key,
    keys.list_keys,
    keys.rotate_key,
    keys.revoke_key,
    quotas.list_quotas,
    quotas.set_quotas,
    tenant_weights.list_weights,
    tenant_weights.set_weight,
)
WATCHING = (metrics.latest_runs,)  # for admins, who may come with a token too


def build_app(services: Services) -> Litestar:
    """All routes over the given services. The app runs the watcher of long polls while it is up."""

    tenants = services.store.tenants
    tokens = Tokens(services.signer, services.settings.jwt_ttl_s)

    async def authenticate(secret: str) -> Any:
        if services.settings.jwt_auth and secret.startswith(PREFIX):
            return await services.work(tenants.principal, tokens.read(secret)[0])
        return await services.work(tenants.authenticate, secret)

    def provide_services() -> Services:
        return services

    room = Room.of(services)

    def provide_room() -> Room:
        return room

    closed = (*CLOSED, *OPENAI, *ANTHROPIC, *ADMIN, *WATCHING, metrics.get_metrics)
    unlisted = [route.fn.__name__ for route in closed if route.fn.__name__ not in NEEDS]
    if unlisted:
        raise ValueError(f"these routes have no scope in api/access.py: {unlisted}")
    keys_seen = KeyCache(authenticate, Guesses(services.settings.unknown_keys_per_minute))
    services.underway.on_change(keys_seen.forget)
    guards = [key_guard(keys_seen, services.underway), scope_guard, act_guard(Rate(ACTS_PER_MINUTE))]
    for_admins = [*guards, key_itself_guard]
    max_body_bytes = services.settings.max_body_bytes
    budget = Budget(TOTAL_BODIES * max_body_bytes, max_body_bytes)
    unread = Unread()
    return Litestar(
        route_handlers=[
            *OPEN,
            Router("/api/v1", route_handlers=CLOSED, guards=guards, security=reference.NEEDS_KEY),
            Router("/anthropic/api/v1", route_handlers=ANTHROPIC, guards=guards, security=reference.NEEDS_KEY),
            Router("/oai/api/v1", route_handlers=OPENAI, guards=guards, security=reference.NEEDS_KEY),
            Router("/api/v1", route_handlers=ADMIN, guards=for_admins, security=reference.NEEDS_KEY),
            Router("/api/v1", route_handlers=WATCHING, guards=guards, security=reference.NEEDS_KEY),
            Router("/", route_handlers=[metrics.get_metrics], guards=guards),
        ],
        dependencies={
            "services": Provide(provide_services, sync_to_thread=False),
            "room": Provide(provide_room, sync_to_thread=False),
        },
        exception_handlers=HANDLERS_BY_PATH,
        request_class=JsonRequest,
        lifespan=[_watching(services, room)],
        request_max_body_size=min(PLAIN_BYTES, max_body_bytes),
        middleware=[lambda app: with_intake(app, budget, services.pressure), lambda app: with_outgo(app, unread)],
        openapi_config=reference.openapi_config(),
        state=State({KEYS: keys_seen, BUDGET: budget, TURNED_AWAY: services.turned_away}),
        logging_config=None,
        debug=False,
    )


def with_edge(app: ASGIApp, *, is_tls: bool = False) -> ASGIApp:
    """Give every request an id (its own `X-Request-Id` if it is sane), a log line that says whose it was, and the
    security headers.

    Requests that went well are logged at debug, those that were refused at info.
    """

    async def edge(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = request_id_of(headers.get(b"x-request-id", b""))
        scope["request_id"] = request_id  # type: ignore[typeddict-unknown-key]
        started = time.monotonic()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = list(message.get("headers", []))
                mark = (b"x-request-id", request_id.encode())
                message["headers"] = [*own, mark, *security_headers(own, is_tls=is_tls)]
            await send(message)

        traced = tracing.request(scope["method"], scope["path"], headers.get(b"traceparent", b""), request_id)
        structlog.contextvars.clear_contextvars()
        with structlog.contextvars.bound_contextvars(request_id=request_id), traced as asked:
            if is_host(headers.get(b"host", b"")):
                await app(scope, receive, send_marked)
            else:
                await _refuse(UserError("the Host header names no host: send the server's name"), send_marked)
            route, seconds = scope.get("path_template", ""), time.monotonic() - started
            log_request(scope["method"], scope["path"], status, seconds, scope.get("user"), route, asked)

    return edge


async def _refuse(error: UserError, send: Send) -> None:
    """Answer without the framework."""
    body = encode_json(Problem(error.message, error.code, error.category))
    headers = [(b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _watching(services: Services, room: Room) -> Callable[[Litestar], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        look = partial(_look, services)
        watching = services.waiters.watching(
            partial(services.work, look), services.recent, look, partial(services.work, services.store.ops.ended_since)
        )
        async with watching, services.pressure.watching(), services.telling.watching(services.work):
            with services.pieces.listening():
                yield
                await room.desk.settle()

    return lifespan


def _look(services: Services, awaited: Sequence[Awaited]) -> Mapping[Awaited, Ended]:
    return services.waiters.brief.timed(partial(_ended_among, services, awaited))


def _ended_among(services: Services, awaited: Sequence[Awaited]) -> Mapping[Awaited, Ended]:
    marks = [mark for mark in awaited if isinstance(mark, EndsAfter)]
    ended: dict[Awaited, Ended] = dict.fromkeys(services.store.endings.reached(marks))
    op_ids = [awaited_id for awaited_id in awaited if not isinstance(awaited_id, EndsAfter)]
    for op_id, row in services.store.ops.ended_among(op_ids).items():
        ended[op_id] = row
    return ended
