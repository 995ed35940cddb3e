"""Who may use a checkpoint by its path: its owner; everybody, once it is published; whoever shows an access token.

A path that may be used can be loaded, sampled from, copied and asked for its shape. Nothing else of another tenant's
checkpoint is open: it is in no list, and its files, its metadata and its lifetime are its owner's. A path that may not
be used answers like one that leads nowhere.

A token speaks for one checkpoint as it is stored, until it expires: it ends when the checkpoint is deleted or saved
again, and when the key that it was made with is revoked. It holds no secret and no tenant, and is
kept nowhere: what it says is signed. The key of another tenant is as good as a token for all of that tenant's
checkpoints, if its scope is full.
"""

from __future__ import annotations

import base64
import time
from functools import partial

import msgspec
from litestar import delete, post
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.links import version_of
from tinsmith.api.paging import iso_time
from tinsmith.api.rates import foreign_key
from tinsmith.api.services import Services, ServicesDep
from tinsmith.errors import NotFoundError
from tinsmith.scopes import Scope
from tinsmith.store.rows import CheckpointRow, Principal
from tinsmith.types import RunId
from tinsmith.wire.paths import TinkerPath, parse_kind, parse_path
from tinsmith.wire.requests import CreateAccessToken

CHECKPOINT = "/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}"
PURPOSE = "weights access"
TOKEN_PREFIX = "tmlw-"
MAX_TOKEN_CHARS = 2048


class AccessToken(Struct):
    """expires: ISO 8601."""

    token: str
    expires: str


class Claims(Struct, array_like=True):
    """What a token says. key_id: of the key that it was made with. expires_at: unix seconds."""

    key_id: str
    path: str
    version: str
    expires_at: int


@post(f"{CHECKPOINT}/publish", status_code=204)
async def publish(
    request: Call, services: ServicesDep, run_id: FromPath[str], kind: FromPath[str], name: FromPath[str]
) -> None:
    """Let every tenant use the path. Doing it again is fine."""
    await _set_public(services, request.user, run_id, kind, name, True)


@delete(f"{CHECKPOINT}/publish", status_code=204)
async def unpublish(
    request: Call, services: ServicesDep, run_id: FromPath[str], kind: FromPath[str], name: FromPath[str]
) -> None:
    """Make it private again. Samplers, runs and copies that others made meanwhile stay theirs."""
    await _set_public(services, request.user, run_id, kind, name, False)


@post(f"{CHECKPOINT}/access_token", status_code=200)
async def create_access_token(
    request: Call,
    services: ServicesDep,
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    data: JSONBody[CreateAccessToken],
) -> AccessToken:
    """A token with which another tenant may load or copy this checkpoint (`weights_access_token` in the SDK)."""
    expires_at = int(time.time()) + data.ttl_seconds
    row = await hand_out(services, request.user, (run_id, kind, name), "checkpoint_access_token_create", expires_at)
    claims = Claims(request.user.key_id, row.path, version_of(row), expires_at)
    return AccessToken(token=_issue(services, claims), expires=iso_time(claims.expires_at))


def find_checkpoint(services: Services, principal: Principal, path: str, token: str | None = None) -> CheckpointRow:
    """The checkpoint that the caller may use by this path.

    Raises:
        UserError: no checkpoint path.
        NotFoundError: nothing there, or nothing that the caller or the token may use.
        GuessingError: the caller has shown too many keys that nobody has.
    """
    place = parse_path(path)
    try:
        return services.store.checkpoints.get_readable(principal.tenant_id, place.run_id, place.kind, place.name)
    except NotFoundError:
        row = None if token is None else _opened(services, principal, token, place)
        if row is None:
            raise
        return row


async def hand_out(
    services: Services, principal: Principal, place: tuple[str, str, str], event: str, expires_at: int
) -> CheckpointRow:
    """The caller's checkpoint at `place` (run, kind, name), once the audit log says what is handed out and until when.

    Raises:
        NotFoundError: the caller has no such checkpoint.
    """
    run_id, kind, name = place
    where = (principal.tenant_id, RunId(run_id), parse_kind(kind), name)
    details = {"expires_at": str(expires_at)}
    return await services.write(services.store.checkpoints.hand_out, *where, event, details, by=principal)


async def _set_public(
    services: Services, principal: Principal, run_id: str, kind: str, name: str, is_public: bool
) -> None:
    place = (principal.tenant_id, RunId(run_id), parse_kind(kind), name)
    await services.write(services.store.checkpoints.set_public, *place, is_public, by=principal)


def _issue(services: Services, claims: Claims) -> str:
    body = base64.urlsafe_b64encode(msgspec.json.encode(claims)).decode().rstrip("=")
    return f"{TOKEN_PREFIX}{body}.{services.signer.sign(PURPOSE, body)}"


def _opened(services: Services, principal: Principal, token: str, place: TinkerPath) -> CheckpointRow | None:
    """The checkpoint at this place, if the token opens it.

    Raises:
        NotFoundError: there is none of the token's tenant.
        GuessingError: as above.
    """
    if len(token) > MAX_TOKEN_CHARS:
        return None
    claims = None
    if token.startswith(TOKEN_PREFIX):
        claims = _read(services, token.removeprefix(TOKEN_PREFIX))
        owner = None if claims is None else services.store.tenants.principal(claims.key_id)
    else:
        look_up = partial(services.store.tenants.authenticate, token)
        owner = foreign_key(services.foreign_keys, principal.tenant_id, look_up)
        if owner is not None and not owner.scope.allows(Scope.FULL):
            return None
    if owner is None:
        return None
    row = services.store.checkpoints.get(owner.tenant_id, place.run_id, place.kind, place.name)
    is_meant = claims is None or (claims.path, claims.version) == (row.path, version_of(row))
    return row if is_meant else None


def _read(services: Services, token: str) -> Claims | None:
    """What a token says, if it was made here and hasn't expired."""
    body, _, signature = token.partition(".")
    if not services.signer.is_good(signature, PURPOSE, body):
        return None
    try:
        claims = msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=Claims)
    except msgspec.ValidationError:  # of a release that said other things
        return None
    return claims if claims.expires_at > time.time() else None
