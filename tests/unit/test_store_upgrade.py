"""A database with requests in it, made before samplers counted their ends, is brought to this schema and works on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from alembic import command
from alembic.config import Config

from tinsmith.scopes import Scope
from tinsmith.store import DATABASE_FILE, open_store
from tinsmith.store.database import Database
from tinsmith.store.migrate import SCRIPTS
from tinsmith.store.rows import NewOp
from tinsmith.types import Failure, OpId, OpKind, SamplerId, TenantId

ROWS = (
    "INSERT INTO tenants VALUES ('t', 'alice', 1.0)",
    "INSERT INTO sessions VALUES ('s', 't', '[]', '{}', NULL, NULL, NULL, 1.0, 1.0, NULL, NULL, NULL)",
    "INSERT INTO samplers VALUES ('s:sample:0', 't', 's', 'tiny', NULL, NULL, NULL, NULL, 1.0)",
    "INSERT INTO ops (op_id, tenant_id, kind, base_model, sampler_id, seq_id, state, cost_tokens, attempts, created_at,"
    " is_expired, media, payload_bytes, meta, result_bytes)"
    " VALUES ('req-1', 't', 'sample', 'tiny', 's:sample:0', 0, 'queued', 1, 0, 1.0, 0, 'x', 0, '{}', 0)",
)


def test_samplers_of_before_count_from_now_on(tmp_path: Path) -> None:
    database = Database(tmp_path / DATABASE_FILE)
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    with database.write() as conn:
        config.attributes["connection"] = conn
        command.upgrade(config, "0001")
        for row in ROWS:
            conn.exec_driver_sql(row)
    database.close()
    store = open_store(tmp_path)
    tenant, sampler = TenantId("t"), SamplerId("s:sample:0")
    failure = Failure("invalid_request", "user", "bad")
    new = NewOp(
        tenant_id=tenant,
        kind=OpKind.SAMPLE,
        base_model="tiny",
        id=OpId("req-2"),
        seq_id=1,
        sampler_id=sampler,
        failure=failure,
    )
    store.ops.enqueue(new, 2.0)
    store.endings.cancel(tenant, OpId("req-1"), 3.0)
    ended, last = store.endings.after(sampler, 0, 0, 10, 10)
    assert [(end.num, end.op_id) for end in ended] == [(1, "req-2"), (2, "req-1")]
    assert last == 2
    assert store.samplers.join(tenant, sampler) == 1
    store.close()


def test_marks_of_administrators_become_scopes(tmp_path: Path) -> None:
    """Keys go on opening what they opened, and those that were revoked stay so."""
    database = Database(tmp_path / DATABASE_FILE)
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    digests = {name: hashlib.sha256(f"tml-{name}".encode()).hexdigest() for name in ("ops", "laptop", "gone")}
    with database.write() as conn:
        config.attributes["connection"] = conn
        command.upgrade(config, "0008_promised_samplers")
        conn.exec_driver_sql("INSERT INTO tenants VALUES ('t', 'alice', 1.0)")
        for name, digest in digests.items():
            revoked = "2.0" if name == "gone" else "NULL"
            conn.exec_driver_sql(
                "INSERT INTO keys (key_id, tenant_id, name, digest, is_admin, created_at, revoked_at)"
                f" VALUES ('k{name}', 't', '{name}', '{digest}', {int(name == 'ops')}, 1.0, {revoked})"
            )
    database.close()
    store = open_store(tmp_path)
    found = {name: store.tenants.authenticate(f"tml-{name}") for name in digests}
    assert found["ops"] is not None
    assert found["laptop"] is not None
    assert (found["ops"].scope, found["laptop"].scope, found["gone"]) == (Scope.ADMIN, Scope.FULL, None)
    assert found["ops"].expires_at is None
    store.close()
