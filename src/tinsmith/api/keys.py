"""Keys, for those who hold an admin key. A secret is shown once, when its key is made."""

from __future__ import annotations

from litestar import delete, get, post
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import iso_time
from tinsmith.api.services import Services, ServicesDep
from tinsmith.store.rows import KeyRow, Principal
from tinsmith.wire.requests import CreateKey


class Key(Struct, omit_defaults=True):
    key_id: str
    name: str
    tenant: str
    created_at: str
    is_admin: bool = False
    revoked_at: str | None = None


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
    return KeyList(keys=[_key(row) for row in rows])


@delete("/admin/keys/{key_id:str}", status_code=200)
async def revoke_key(request: Call, services: ServicesDep, key_id: FromPath[str]) -> Key:
    """The key stops working within a second."""
    return _key(await services.write(services.store.tenants.revoke_key, key_id, by=request.user))


def _create(services: Services, principal: Principal, asked: CreateKey) -> NewKey:
    tenants = services.store.tenants
    name = asked.tenant or principal.tenant_name
    tenant = tenants.by_name(name) or tenants.create(name, by=principal)
    row, secret = tenants.create_key(tenant.tenant_id, asked.name, is_admin=asked.is_admin, by=principal)
    return NewKey(
        key_id=row.key_id,
        name=row.name,
        tenant=row.tenant_name,
        created_at=iso_time(row.created_at),
        is_admin=row.is_admin,
        secret=secret,
    )


def _key(row: KeyRow) -> Key:
    return Key(
        key_id=row.key_id,
        name=row.name,
        tenant=row.tenant_name,
        created_at=iso_time(row.created_at),
        is_admin=row.is_admin,
        revoked_at=None if row.revoked_at is None else iso_time(row.revoked_at),
    )
