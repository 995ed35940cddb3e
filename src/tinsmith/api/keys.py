"""Keys, for those who hold an admin key. A secret is shown once, when its key is made."""

from __future__ import annotations

import time
from typing import Any

from litestar import delete, get, post
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import iso_time
from tinsmith.api.services import Services, ServicesDep
from tinsmith.errors import UserError
from tinsmith.scopes import Scope
from tinsmith.store.rows import KeyRow, Principal
from tinsmith.wire.requests import CreateKey, RotateKey


class Key(Struct, omit_defaults=True):
    """Times are ISO 8601. replaced_by: the id of the key that was made to take its place."""

    key_id: str
    name: str
    tenant: str
    created_at: str
    scope: str
    is_admin: bool = False
    expires_at: str | None = None
    revoked_at: str | None = None
    replaced_by: str | None = None


class NewKey(Key, omit_defaults=True, kw_only=True):
    secret: str


class KeyList(Struct):
    keys: list[Key]


@post("/admin/keys", status_code=200)
async def create_key(request: Call, services: ServicesDep, data: JSONBody[CreateKey]) -> NewKey:
    """Make a key; a tenant of a new name comes to be with it."""
    return await services.write(_create, services, request.user, data)


@get("/admin/keys")
async def list_keys(request: Call, services: ServicesDep) -> KeyList:
    rows = await services.work(services.store.tenants.list_keys)
    return KeyList(keys=[Key(**_fields(row)) for row in rows])


@post("/admin/keys/{key_id:str}/rotate", status_code=200)
async def rotate_key(request: Call, services: ServicesDep, key_id: FromPath[str], data: JSONBody[RotateKey]) -> NewKey:
    """Make a successor of a key; the key itself works for `grace_s` more."""
    expires_at = None if data.expires_s is None else time.time() + data.expires_s
    row, secret = await services.write(
        services.store.tenants.rotate_key, key_id, data.grace_s, expires_at, by=request.user
    )
    if data.grace_s:
        services.underway.changed(key_id)
    else:
        services.underway.revoked(key_id)
    return NewKey(**_fields(row), secret=secret)


@delete("/admin/keys/{key_id:str}", status_code=200)
async def revoke_key(request: Call, services: ServicesDep, key_id: FromPath[str]) -> Key:
    """The key stops working at once, and what was made with it; connections that use it are closed."""
    row = await services.write(services.store.tenants.revoke_key, key_id, by=request.user)
    services.underway.revoked(key_id)
    return Key(**_fields(row))


def _create(services: Services, principal: Principal, asked: CreateKey) -> NewKey:
    """Raises: UserError: `is_admin` and another scope."""
    scope = Scope.ADMIN if asked.is_admin and asked.scope is None else asked.scope or Scope.FULL
    if asked.is_admin and scope is not Scope.ADMIN:
        raise UserError(f"is_admin goes with scope admin alone, not {scope}")
    tenants = services.store.tenants
    name = asked.tenant or principal.tenant_name
    tenant = tenants.by_name(name) or tenants.create(name, by=principal)
    expires_at = None if asked.expires_s is None else time.time() + asked.expires_s
    row, secret = tenants.create_key(tenant.tenant_id, asked.name, scope=scope, expires_at=expires_at, by=principal)
    return NewKey(**_fields(row), secret=secret)


def _fields(row: KeyRow) -> dict[str, Any]:
    return {
        "key_id": row.key_id,
        "name": row.name,
        "tenant": row.tenant_name,
        "created_at": iso_time(row.created_at),
        "scope": row.scope.value,
        "is_admin": row.is_admin,
        "expires_at": None if row.expires_at is None else iso_time(row.expires_at),
        "revoked_at": None if row.revoked_at is None else iso_time(row.revoked_at),
        "replaced_by": row.successor_id,
    }
