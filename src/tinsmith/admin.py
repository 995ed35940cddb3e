"""The administrator of a data directory: a tenant, and a key that lies beside the database."""

from __future__ import annotations

import contextlib

from tinsmith.errors import ConfigError
from tinsmith.files.datadir import DataDir
from tinsmith.scopes import Scope
from tinsmith.store import open_store

ADMIN = "admin"


def ensure_admin_key(data_dir: DataDir, synchronous: str) -> str | None:
    """Bring the database up to date and see to it that admin.key holds a key.

    Returns:
        The secret, if it was made now: on the first start, or when the file was taken away.

    Raises:
        ConfigError: the database can't be used, or the key in the file has been revoked.
    """
    with contextlib.closing(open_store(data_dir.path, synchronous=synchronous)) as store:
        held = data_dir.admin_key()
        if held is not None:
            principal = store.tenants.authenticate(held)
            if principal is None or not principal.is_admin:
                raise ConfigError(
                    f"{data_dir.admin_key_file} holds a key that this database doesn't know as an administrator's; "
                    f"remove the file, and a new one is made"
                )
            return None
        tenant = store.tenants.by_name(ADMIN) or store.tenants.create(ADMIN)
        _, secret = store.tenants.create_key(tenant.tenant_id, ADMIN, scope=Scope.ADMIN)
        data_dir.write_admin_key(secret)
        return secret
