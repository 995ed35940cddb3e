"""A session's timeline as a file for Perfetto, behind a signed link that works without a key for an hour."""

from __future__ import annotations

import time
from functools import partial
from urllib.parse import quote, urlencode

from litestar import Response, get
from litestar.params import FromPath, FromQuery
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.links import holder_of
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.timeline import write_trace
from tinsmith.errors import ForbiddenError, GoneError
from tinsmith.types import SessionId, TenantId

LINK_TTL_S = 3600
MAX_REQUESTS = 10_000  # of one trace, the newest
MEDIA = "application/octet-stream"
PATH = "/api/v1/traces"


class TraceExport(Struct, omit_defaults=True):
    status: str
    url: str | None = None
    error: str | None = None


@get("/sessions/{session_id:str}/trace_export")
async def export_trace(request: Call, services: ServicesDep, session_id: FromPath[str]) -> TraceExport:
    """A link to the trace, which is made when it is fetched and so is up to date."""
    await services.work(services.store.sessions.get, request.user.tenant_id, SessionId(session_id))
    expires = int(time.time()) + LINK_TTL_S
    key = request.user.key_id
    signature = services.signer.sign("trace", session_id, expires, key)
    base = services.settings.public_url.rstrip("/") or str(request.base_url).rstrip("/")
    query = urlencode({"expires": expires, "key": key, "signature": signature})
    return TraceExport(status="ready", url=f"{base}{PATH}/{quote(session_id)}.pftrace?{query}")


@get(f"{PATH}/{{file:str}}")
async def fetch_trace(
    services: ServicesDep,
    file: FromPath[str],
    expires: FromQuery[int],
    key: FromQuery[str],
    signature: FromQuery[str],
) -> Response[bytes]:
    """The trace that a signed link leads to; needs no key."""
    session_id = file.removesuffix(".pftrace")
    if not services.signer.is_good(signature, "trace", session_id, expires, key):
        raise ForbiddenError("this link was not made here, or was changed: ask for another one")
    if expires <= time.time():
        raise GoneError("this link has expired: ask for another one")
    holder = await services.work(holder_of, services, key)
    make = partial(services.work, _trace, services, holder.tenant_id, SessionId(session_id))
    body = await services.traces.answer((holder.tenant_id, session_id), make)
    return Response(body, media_type=MEDIA)


def _trace(services: Services, tenant_id: TenantId, session_id: SessionId) -> bytes:
    session = services.store.sessions.get(tenant_id, session_id)
    ops = services.store.traces.ops(tenant_id, session_id, MAX_REQUESTS + 1)
    title = f"session {session.display_name or session_id}"
    if len(ops) > MAX_REQUESTS:
        ops = ops[-MAX_REQUESTS:]
        title += f" (its newest {MAX_REQUESTS} requests; older ones are left out)"
    return write_trace(title, ops, services.store.traces.shared(ops))
