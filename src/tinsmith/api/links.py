"""Signed links to the files of a checkpoint: they work without a key, for a while, for that file alone.

A link is bound to the checkpoint, its tenant, the stored file behind it, the key that it was made with and a time. So
it ends when it expires, when the key is revoked, and when the checkpoint is deleted, expires, or is saved again under
its name. Its signature stands in the query, which is never logged.
"""

from __future__ import annotations

import hashlib
import time
from urllib.parse import quote, urlencode

from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.services import Services
from tinsmith.errors import ForbiddenError, GoneError, NotFoundError
from tinsmith.store.rows import CheckpointRow, Principal
from tinsmith.types import RunId
from tinsmith.wire.paths import parse_kind

PATH = "/api/v1/downloads"
PURPOSE = "download"
FORMAT = 2  # of the files that are made from a checkpoint; a new one ends the links and tags of the one before


class LinkQuery(Struct):
    """What a link carries beside its path. expires: unix seconds. key: the id of the key that it was made with."""

    expires: int
    key: str
    version: str
    signature: str


def make_link(services: Services, request: Call, row: CheckpointRow, file: str, expires: int) -> str:
    """The URL, at `public_url` or where the request came to."""
    version, key = version_of(row), request.user.key_id
    signature = services.signer.sign(PURPOSE, row.run_id, row.kind.value, row.name, file, version, expires, key)
    base = services.settings.public_url.rstrip("/") or str(request.base_url).rstrip("/")
    place = "/".join(quote(part, safe=":") for part in (row.run_id, row.kind.value, row.name, file))
    query = urlencode({"expires": expires, "key": key, "version": version, "signature": signature})
    return f"{base}{PATH}/{place}?{query}"


def follow_link(services: Services, run_id: str, kind: str, name: str, file: str, query: LinkQuery) -> CheckpointRow:
    """The checkpoint that a link leads to.

    Raises:
        ForbiddenError: the link was not made here, or was changed.
        GoneError: it has expired, its key was revoked, or the checkpoint was saved again.
        NotFoundError: the checkpoint was deleted, or has expired.
    """
    signed = (run_id, kind, name, file, query.version, query.expires, query.key)
    if not services.signer.is_good(query.signature, PURPOSE, *signed):
        raise ForbiddenError(
            "this link is not one of this server's, or was changed: copy it whole, or ask for a new one"
        )
    if query.expires <= time.time():
        raise GoneError("this link has expired: ask for a new one")
    holder_of(services, query.key)
    row = services.store.checkpoints.get_any(RunId(run_id), parse_kind(kind), name)
    if version_of(row) != query.version:
        raise GoneError("the checkpoint was saved again since this link was made: ask for a new one")
    return row


def holder_of(services: Services, key_id: str) -> Principal:
    """Who made a link: whom its key speaks for.

    Raises:
        GoneError: the key was revoked.
    """
    principal = services.store.tenants.principal(key_id)
    if principal is None:
        raise GoneError("the key that this link was made with was revoked: ask for a new one with another key")
    return principal


def version_of(row: CheckpointRow) -> str:
    """32 hex digits that change with the tenant, the stored file and the format of what is made from it."""
    return hashlib.sha256(f"{FORMAT}\n{row.tenant_id}\n{row.blob}".encode()).hexdigest()[:32]


def parse_query(query: dict[str, str]) -> LinkQuery:
    """Raises: NotFoundError: no link at all."""
    try:
        return LinkQuery(int(query["expires"]), query["key"], query["version"], query["signature"])
    except (KeyError, ValueError):
        raise NotFoundError(
            "files are fetched by signed links: ask for one at .../archive or .../external_weights_urls"
        ) from None
