"""A key about itself: what it is, its exchange for a short-lived token, and its end."""

from __future__ import annotations

from litestar import delete, get, post
from msgspec import Struct

from tinsmith.api.auth import Call, key_itself_guard, secret_of
from tinsmith.api.body import read_body
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.tokens import PREFIX, Tokens
from tinsmith.errors import UnsupportedError
from tinsmith.store.rows import Principal

KEY_NUMBER_DIGITS = 13  # 52 bits, which every JSON reader keeps


class Token(Struct):
    jwt: str


class Organization(Struct):
    name: str


class User(Struct):
    email: str


class KeyDetails(Struct):
    org_details: Organization
    user_details: User


class SelfKey(Struct):
    key_id: int
    name: str
    note: str
    details: KeyDetails


@post("/auth/token", status_code=200, request_max_body_size=None)
async def exchange_token(request: Call, services: ServicesDep) -> Token:
    """A token that stands for the caller's key; asked for with a token, one that ends no later.

    A body is read and ignored.
    """
    await read_body(request, services)
    settings = services.settings
    if not settings.jwt_auth:
        raise UnsupportedError("this server takes keys as they are: send yours, or start the server with --jwt-auth")
    tokens = Tokens(services.signer, settings.jwt_ttl_s)
    secret = secret_of(request)
    not_after = tokens.read(secret)[1] if secret.startswith(PREFIX) else None
    return Token(jwt=tokens.issue(request.user, not_after))


@get("/auth/apikey/me")
async def get_own_key(request: Call, services: ServicesDep) -> SelfKey:
    """The key that the request came with. There are no mail addresses here: the tenant's name stands for one."""
    return await services.work(_describe, services, request.user)


@delete("/auth/apikey/me", status_code=204, guards=[key_itself_guard])
async def delete_own_key(request: Call, services: ServicesDep) -> None:
    """Revoke the key that the request came with; it stops working at once."""
    await services.write(services.store.tenants.revoke_key, request.user.key_id, by=request.user)
    services.underway.revoked(request.user.key_id)


def _describe(services: Services, principal: Principal) -> SelfKey:
    key = services.store.tenants.key(principal.key_id)
    return SelfKey(
        key_id=int(key.key_id[1 : 1 + KEY_NUMBER_DIGITS], 16),
        name=key.name,
        note=key.key_id,
        details=KeyDetails(Organization(key.tenant_name), User(key.tenant_name)),
    )
