"""What every answer bears and every request leaves behind: an id, security headers, a line in the log."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

import structlog
from structlog.contextvars import bind_contextvars

from tinsmith.observe.metrics import OTHER
from tinsmith.observe.series import HTTP_REQUESTS, HTTP_SECONDS
from tinsmith.observe.tracing import Asked
from tinsmith.store.rows import OpRow, Principal

log = structlog.get_logger("tinsmith.api")
_lines = logging.getLogger("tinsmith.api")

PUBLISH_EVERY_S = 0.25
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
HOST = re.compile(rb"(?:[A-Za-z0-9._~-]{0,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(\d{0,5}))?")
MAX_PORT = 65535
DATA_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
PAGE_POLICY = (  # of what a browser shows: all that it loads is served from here, and scripts are files
    b"content-security-policy",
    b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
)
NOT_KEPT = (b"cache-control", b"no-store")
HTTPS_ALONE = (b"strict-transport-security", b"max-age=31536000")


def security_headers(own: Iterable[tuple[bytes, bytes]] = (), *, is_tls: bool = False) -> list[tuple[bytes, bytes]]:
    """What is added to an answer's own headers."""
    sent = dict(own)
    is_page = sent.get(b"content-type", b"").startswith(b"text/html")
    return [
        *SECURITY_HEADERS,
        PAGE_POLICY if is_page else DATA_POLICY,
        *([] if NOT_KEPT[0] in sent else [NOT_KEPT]),
        *([HTTPS_ALONE] if is_tls else []),
    ]


def request_id_of(header: bytes) -> str:
    """The id that a client gave its request, if it is sane, or a new one."""
    sent = header.decode("latin-1")
    return sent if sent and REQUEST_ID.fullmatch(sent) else os.urandom(16).hex()


def bind_op(op: OpRow) -> None:
    """Have the line of the HTTP request under way say which request of a run or sampler it is about."""
    where = {"run_id": op.run_id, "sampler_id": op.sampler_id}
    bind_contextvars(
        kind=op.kind.value, op_id=op.id, **{name: each for name, each in where.items() if each is not None}
    )


def is_host(header: bytes) -> bool:
    """Whether a Host header names a host; the framework builds URLs with it, and fails on what is none."""
    found = HOST.fullmatch(header)
    return found is not None and int(found[1] or 0) <= MAX_PORT


def log_request(
    method: str, path: str, status: int, seconds: float, caller: Principal | None, route: str, asked: Asked | None
) -> None:
    """Leave what there is to know of an answered request. route: the path with names in place of ids; empty: none.
    asked: its span, if it is traced."""
    if asked is not None:
        asked.answered(status, route, "" if caller is None else caller.tenant_name)
    HTTP_REQUESTS.add(route or OTHER, str(status))
    HTTP_SECONDS.observe(seconds, route or OTHER)
    HTTP_SECONDS.publish(PUBLISH_EVERY_S)
    is_routine = status < 400 or status == 408 or path.endswith("/healthz")
    level = logging.DEBUG if is_routine else logging.INFO
    if not _lines.isEnabledFor(level):  # asked first, since to ask structlog costs a tenth of a request
        return
    who = {} if caller is None else {"tenant": caller.tenant_name}
    log.log(level, "request", method=method, path=path, status=status, ms=round(seconds * 1e3, 1), **who)
