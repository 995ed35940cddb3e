"""Tenants and their keys.

Owns the way from a secret to who it speaks for. A secret is shown once, at its creation, and only its sha256 is stored:
it is 256 random bits, which need no slow hash. A revoked key stays as a row, so that its name can still be looked up.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, insert, select, update

from tinsmith.errors import NotFoundError, UserError
from tinsmith.store.audit import note
from tinsmith.store.database import Database
from tinsmith.store.rows import KeyRow, Principal, TenantRow
from tinsmith.store.schema import keys, tenants
from tinsmith.types import TenantId

PREFIX = "tml-"  # the SDK refuses keys that begin otherwise

_BY_NAME = select(tenants.c.tenant_id, tenants.c.name, tenants.c.created_at).where(tenants.c.name == bindparam("name"))
_TENANT_NAME = select(tenants.c.name).where(tenants.c.tenant_id == bindparam("tenant_id"))
_INSERT_TENANT = insert(tenants).inline()
_INSERT_KEY = insert(keys).inline()
_KEYS = (
    select(
        keys.c.key_id, keys.c.tenant_id, tenants.c.name, keys.c.name, keys.c.is_admin, keys.c.created_at,
        keys.c.revoked_at,
    )
    .join(tenants, tenants.c.tenant_id == keys.c.tenant_id)
    .order_by(keys.c.created_at, keys.c.key_id)
)  # fmt: skip
_KEY = _KEYS.where(keys.c.key_id == bindparam("key_id"))
_REVOKE = (
    update(keys)
    .where(keys.c.key_id == bindparam("id"), keys.c.revoked_at.is_(None))
    .values(revoked_at=bindparam("now"))
)
_PRINCIPAL = (
    select(keys.c.tenant_id, tenants.c.name, keys.c.key_id, keys.c.is_admin)
    .join(tenants, tenants.c.tenant_id == keys.c.tenant_id)
    .where(keys.c.revoked_at.is_(None))
)
_AUTHENTICATE = _PRINCIPAL.where(keys.c.digest == bindparam("digest"))
_BY_KEY_ID = _PRINCIPAL.where(keys.c.key_id == bindparam("key_id"))


class Tenants:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, now: float | None = None, *, by: Principal | None = None) -> TenantRow:
        """`by` stands in the audit log, here and below; None is the server itself.

        Raises:
            UserError: the name is empty or taken.
        """
        if not name:
            raise UserError("a tenant needs a name")
        row = TenantRow(TenantId("t" + secrets.token_hex(8)), name, time.time() if now is None else now)
        with self._database.write() as conn:
            if conn.execute(_BY_NAME, {"name": name}).first() is not None:
                raise UserError(f"there is a tenant named {name!r} already; choose another name")
            conn.execute(_INSERT_TENANT, {"tenant_id": row.tenant_id, "name": name, "created_at": row.created_at})
            note(conn, "organization_create", row.tenant_id, by, {"organization": name}, row.created_at)
        return row

    def by_name(self, name: str) -> TenantRow | None:
        with self._database.read() as conn:
            row = conn.execute(_BY_NAME, {"name": name}).first()
        return None if row is None else TenantRow(*row)

    def create_key(
        self,
        tenant_id: TenantId,
        name: str,
        *,
        is_admin: bool = False,
        now: float | None = None,
        by: Principal | None = None,
    ) -> tuple[KeyRow, str]:
        """A new key and its secret, which can't be had again.

        Raises:
            NotFoundError: no such tenant.
        """
        secret = PREFIX + secrets.token_urlsafe(32)
        key_id = "k" + secrets.token_hex(8)
        created_at = time.time() if now is None else now
        with self._database.write() as conn:
            tenant_name = conn.execute(_TENANT_NAME, {"tenant_id": tenant_id}).scalar()
            if tenant_name is None:
                raise NotFoundError(f"no tenant {tenant_id}")
            conn.execute(
                _INSERT_KEY,
                {
                    "key_id": key_id,
                    "tenant_id": tenant_id,
                    "name": name,
                    "digest": _digest(secret),
                    "is_admin": is_admin,
                    "created_at": created_at,
                },
            )
            row = KeyRow(key_id, tenant_id, tenant_name, name, is_admin, created_at, None)
            note(conn, "organization_key_create", tenant_id, by, _about(row), created_at)
        return row, secret

    def list_keys(self) -> list[KeyRow]:
        """All keys of all tenants, revoked ones too, oldest first."""
        with self._database.read() as conn:
            return [_to_key(row) for row in conn.execute(_KEYS)]

    def revoke_key(self, key_id: str, now: float | None = None, *, by: Principal | None = None) -> KeyRow:
        """The key opens nothing from now on. Doing it again changes nothing.

        Raises:
            NotFoundError: no such key.
        """
        at = time.time() if now is None else now
        with self._database.write() as conn:
            is_first = conn.execute(_REVOKE, {"id": key_id, "now": at}).rowcount > 0
            found = conn.execute(_KEY, {"key_id": key_id}).first()
            if found is None:
                raise NotFoundError(f"no key {key_id}")
            row = _to_key(found)
            if is_first:
                note(conn, "organization_key_revoke", row.tenant_id, by, _about(row), at)
        return row

    def key(self, key_id: str) -> KeyRow:
        """Raises: NotFoundError: no such key."""
        with self._database.read() as conn:
            row = conn.execute(_KEY, {"key_id": key_id}).first()
        if row is None:
            raise NotFoundError(f"no key {key_id}")
        return _to_key(row)

    def authenticate(self, secret: str) -> Principal | None:
        """Who the secret speaks for; None for an unknown or revoked one."""
        with self._database.read() as conn:
            row = conn.execute(_AUTHENTICATE, {"digest": _digest(secret)}).first()
        return None if row is None else Principal(*row)

    def principal(self, key_id: str) -> Principal | None:
        """Who a key speaks for, by its id: for what was signed in exchange for it; None for a revoked one."""
        with self._database.read() as conn:
            row = conn.execute(_BY_KEY_ID, {"key_id": key_id}).first()
        return None if row is None else Principal(*row)


def _about(row: KeyRow) -> dict[str, str]:
    """A key as the audit log speaks of it."""
    role = "administrator" if row.is_admin else "user"
    return {"organization": row.tenant_name, "key_id": row.key_id, "key_name": row.name, "role": role}


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _to_key(row: Sequence[Any]) -> KeyRow:
    return KeyRow(*row)
