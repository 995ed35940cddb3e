"""Tenants and their keys.

Owns the way from a secret to who it speaks for. A secret is shown once, at its creation, and only its sha256 is stored:
it is 256 random bits, which need no slow hash. A revoked key stays as a row, as does one that has expired, so that its
name can still be looked up.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, bindparam, insert, or_, select, update

from tinsmith.errors import NotFoundError, UserError
from tinsmith.scopes import Scope
from tinsmith.store.audit import note
from tinsmith.store.database import Database
from tinsmith.store.rows import KeyRow, Principal, TenantRow
from tinsmith.store.schema import checkpoints, keys, quotas, runs, tallies, tenants
from tinsmith.types import TenantId

PREFIX = "tml-"  # the SDK refuses keys that begin otherwise

_BY_NAME = select(tenants.c.tenant_id, tenants.c.name, tenants.c.created_at).where(tenants.c.name == bindparam("name"))
_TENANT_NAME = select(tenants.c.name).where(tenants.c.tenant_id == bindparam("tenant_id"))
_INSERT_TENANT = insert(tenants).inline()
_INSERT_KEY = insert(keys).inline()
_KEYS = (
    select(
        keys.c.key_id, keys.c.tenant_id, tenants.c.name, keys.c.name, keys.c.scope, keys.c.created_at,
        keys.c.expires_at, keys.c.revoked_at, keys.c.successor_id,
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
_SUCCEED = (
    update(keys)
    .where(keys.c.key_id == bindparam("id"))
    .values(expires_at=bindparam("until"), successor_id=bindparam("successor"))
)
_PRINCIPAL = (
    select(keys.c.digest, keys.c.tenant_id, tenants.c.name, keys.c.key_id, keys.c.scope, keys.c.expires_at)
    .join(tenants, tenants.c.tenant_id == keys.c.tenant_id)
    .where(keys.c.revoked_at.is_(None), or_(keys.c.expires_at.is_(None), keys.c.expires_at > bindparam("now")))
)
_AUTHENTICATE = _PRINCIPAL.where(keys.c.digest == bindparam("digest"))
_BY_KEY_ID = _PRINCIPAL.where(keys.c.key_id == bindparam("key_id"))
_QUOTAS = select(quotas.c.quota, quotas.c.tenant_id, quotas.c.amount).where(quotas.c.scope == bindparam("of"))
_TALLIES = select(tallies.c.period, tallies.c.kind, tallies.c.quantity).where(tallies.c.scope == bindparam("of"))


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
        scope: Scope = Scope.FULL,
        expires_at: float | None = None,
        now: float | None = None,
        by: Principal | None = None,
    ) -> tuple[KeyRow, str]:
        """A new key and its secret, which can't be had again. expires_at: unix seconds; None: it lasts.

        Raises:
            NotFoundError: no such tenant.
        """
        created_at = time.time() if now is None else now
        with self._database.write() as conn:
            tenant_name = conn.execute(_TENANT_NAME, {"tenant_id": tenant_id}).scalar()
            if tenant_name is None:
                raise NotFoundError(f"no tenant {tenant_id}")
            made = KeyRow("", tenant_id, tenant_name, name, scope, created_at, expires_at)
            row, secret = _insert_key(conn, made)
            note(conn, "organization_key_create", tenant_id, by, _about(row), created_at)
        return row, secret

    def rotate_key(
        self,
        key_id: str,
        grace_s: float,
        expires_at: float | None = None,
        now: float | None = None,
        *,
        by: Principal | None = None,
    ) -> tuple[KeyRow, str]:
        """A successor of the key, with its tenant, name, scope and quotas, and the successor's secret. What the key has
        used of the day and the month counts for its successor too. The key itself works for `grace_s` more, or until
        its own end if that is sooner.

        Args:
            expires_at: of the successor; None: it lives as long as the key was made for.

        Raises:
            NotFoundError: no such key.
            UserError: it was revoked, has expired, or has a successor.
        """
        at = time.time() if now is None else now
        with self._database.write() as conn:
            found = conn.execute(_KEY, {"key_id": key_id}).first()
            if found is None:
                raise NotFoundError(f"no key {key_id}")
            old = _to_key(found)
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= at):
                raise UserError(f"key {key_id} was revoked or has expired: make a new one")
            if old.successor_id is not None:
                raise UserError(f"key {key_id} was rotated already: its successor is {old.successor_id}")
            if expires_at is None and old.expires_at is not None:
                expires_at = at + old.expires_at - old.created_at
            row, secret = _insert_key(conn, replace(old, created_at=at, expires_at=expires_at))
            until = at + grace_s if old.expires_at is None else min(old.expires_at, at + grace_s)
            conn.execute(_SUCCEED, {"id": key_id, "until": until, "successor": row.key_id})
            _hand_on(conn, key_id, row.key_id)
            details = {**_about(row), "rotated_key_id": key_id, "rotated_key_expires_at": str(int(until))}
            note(conn, "organization_key_rotate", row.tenant_id, by, details, at)
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

    def authenticate(self, secret: str, now: float | None = None) -> Principal | None:
        """Who the secret speaks for; None for an unknown, expired or revoked one."""
        digest = _digest(secret)
        with self._database.read() as conn:
            row = conn.execute(_AUTHENTICATE, {"digest": digest, "now": time.time() if now is None else now}).first()
        return None if row is None or not hmac.compare_digest(row[0], digest) else _to_principal(row)

    def principal(self, key_id: str, now: float | None = None) -> Principal | None:
        """Who a key speaks for, by its id: for what was signed in exchange for it; None for one that doesn't work any
        more."""
        with self._database.read() as conn:
            row = conn.execute(_BY_KEY_ID, {"key_id": key_id, "now": time.time() if now is None else now}).first()
        return None if row is None else _to_principal(row)


def _insert_key(conn: Connection, row: KeyRow) -> tuple[KeyRow, str]:
    """The row under an id of its own, and its secret."""
    secret = PREFIX + secrets.token_urlsafe(32)
    made = replace(row, key_id="k" + secrets.token_hex(8))
    values = {
        "key_id": made.key_id,
        "tenant_id": made.tenant_id,
        "name": made.name,
        "digest": _digest(secret),
        "scope": made.scope.value,
        "created_at": made.created_at,
        "expires_at": made.expires_at,
    }
    conn.execute(_INSERT_KEY, values)
    return made, secret


def _hand_on(conn: Connection, key_id: str, successor_id: str) -> None:
    """What bounds a key, and what it has used, for its successor too; its runs and checkpoints count for that one."""
    for table, found in ((quotas, _QUOTAS), (tallies, _TALLIES)):
        rows = [{**row, "scope": successor_id} for row in conn.execute(found, {"of": key_id}).mappings()]
        if rows:
            conn.execute(insert(table).inline(), rows)
    for table in (runs, checkpoints):
        conn.execute(update(table).where(table.c.key_id == key_id).values(key_id=successor_id))


def _about(row: KeyRow) -> dict[str, str]:
    """A key as the audit log speaks of it."""
    role = "administrator" if row.is_admin else "user"
    until = {} if row.expires_at is None else {"expires_at": str(int(row.expires_at))}
    about = {"organization": row.tenant_name, "key_id": row.key_id, "key_name": row.name, "role": role}
    return {**about, "scope": row.scope.value, **until}


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _to_key(row: Sequence[Any]) -> KeyRow:
    key_id, tenant_id, tenant_name, name, scope, *times = row
    return KeyRow(key_id, tenant_id, tenant_name, name, Scope(scope), *times)


def _to_principal(row: Sequence[Any]) -> Principal:
    _, tenant_id, tenant_name, key_id, scope, expires_at = row
    return Principal(tenant_id, tenant_name, key_id, Scope(scope), expires_at)
