"""Transactions, threads, processes, crashes and migrations."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, text

from tinsmith import crashpoints
from tinsmith.errors import CapacityError, ConfigError, StorageFullError, TakenError
from tinsmith.store import Store, database, open_store
from tinsmith.store.rows import Finished, NewOp, WorkerId
from tinsmith.store.schema import metadata
from tinsmith.types import OpId, OpKind, OpState, RunId, TenantId

SPAWN = multiprocessing.get_context("spawn")


def test_migrations_make_the_schema(store: Store, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'tinsmith.db'}")
    with engine.connect() as conn:
        assert compare_metadata(MigrationContext.configure(conn), metadata) == []
        query = text("SELECT name FROM sqlite_master WHERE type = 'index' AND sql NOT NULL")
        indices = set(conn.execute(query).scalars())
        assert indices == {index.name for table in metadata.tables.values() for index in table.indexes}
    engine.dispose()


def test_opening_again_keeps_everything_and_the_logging(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    first = open_store(tmp_path)
    tenant = first.tenants.create("alice")
    first.close()
    second = open_store(tmp_path, synchronous="NORMAL")
    assert second.tenants.by_name("alice") == tenant
    second.close()
    assert (root.level, list(root.handlers)) == before
    assert not logging.getLogger("alembic").disabled


def test_pragmas(store: Store) -> None:
    with store._database.write() as conn:
        values = [conn.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "foreign_keys", "synchronous")]
    assert values == ["wal", 1, 1]
    with pytest.raises(ConfigError):
        open_store(Path("unused"), synchronous="OFF")


def test_a_full_disk_is_no_damage(store: Store) -> None:
    with store._database.write() as conn:
        pages = conn.exec_driver_sql("PRAGMA page_count").scalar()
        conn.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for number in range(10_000):
            store.tenants.create(f"{number:0200d}")

    with pytest.raises(StorageFullError, match="the disk is full: free space"):
        fill()
    with store._database.write() as conn:
        conn.exec_driver_sql("PRAGMA max_page_count = 1000000")
    store.tenants.create("after")


def test_who_may_not_wait_for_another_writer_is_told_at_once(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path)
    for busy in (store, other):  # a thread of this process, another process
        with busy._database.write() as conn:
            conn.exec_driver_sql("SELECT 1")
            started = time.monotonic()
            with pytest.raises(TakenError):
                store.ops.enqueue_all([], 0.0, may_wait=False)
            assert time.monotonic() - started < 1.0
    assert store.ops.enqueue_all([], 0.0, may_wait=False) == []
    store.close()
    other.close()


def test_claims_and_heartbeats_wait_for_no_disk_and_everything_else_does(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for is_durable, level in ((True, 2), (False, 1), (True, 2)):
        with store._database.write(is_durable=is_durable) as conn:
            assert conn.exec_driver_sql("PRAGMA synchronous").scalar() == level
    store.close()


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / "tinsmith.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    with pytest.raises(ConfigError, match="newer"):
        open_store(tmp_path)


def test_a_failed_write_leaves_nothing(store: Store, world: Any) -> None:
    def write() -> None:
        with store._database.write() as conn:
            conn.execute(text("UPDATE tenants SET name = 'x'"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert store.tenants.by_name("alice") is not None


def test_a_busy_database_is_a_lack_of_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    store = open_store(tmp_path)
    other = sqlite3.connect(tmp_path / "tinsmith.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CapacityError):
        store.tenants.create("alice")
    assert store.tenants.by_name("alice") is None
    other.execute("COMMIT")
    other.close()
    store.tenants.create("alice")
    store.close()
    with pytest.raises(RuntimeError):
        store.tenants.by_name("alice")


def test_hot_queries_use_their_indices(store: Store) -> None:
    plans = {
        "ix_ops_queue": "SELECT num FROM ops "
        "WHERE base_model = ? AND kind = 'sample' AND state = 'queued' ORDER BY num",
        "ix_ops_run_queue": "SELECT ops.num FROM ops JOIN runs ON runs.run_id = ops.run_id "
        "WHERE runs.lease_owner = ? AND ops.state = 'queued' AND ops.seq_id <= runs.head_seq",
        "ix_runs_wants_worker_base_model": "SELECT run_id FROM runs WHERE wants_worker IS 1 AND base_model = ?",
    }
    with store._database.read() as conn:
        for index, query in plans.items():
            steps = conn.exec_driver_sql("EXPLAIN QUERY PLAN " + query, ("x",)).all()
            assert any(index in step[-1] for step in steps), (index, steps)
            assert not any("SCAN ops" in step[-1] for step in steps)


def _op(tenant: TenantId, run: RunId, seq: int, name: str, kind: OpKind = OpKind.FORWARD_BACKWARD) -> NewOp:
    return NewOp(tenant_id=tenant, kind=kind, base_model="tiny", id=OpId(name), seq_id=seq, run_id=run)


def test_threads_share_a_store(store: Store, world: Any) -> None:
    run = world.run()
    new: list[bool] = []
    failures: list[BaseException] = []

    def send(worker: int) -> None:
        try:
            for seq in range(1, 26):
                enqueued = store.ops.enqueue(_op(world.tenant, run, seq, f"req-t{worker}-{seq}"), 1.0)
                new.append(enqueued.is_new)
                store.runs.get(world.tenant, run)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sum(new) == 25
    assert world.head(run) == 25


def _send(path: Path, tenant: TenantId, run: RunId, name: str, out: Any) -> None:
    store = open_store(path, synchronous="NORMAL")
    out.put(
        [store.ops.enqueue(_op(tenant, run, seq, f"req-{name}-{seq}"), 1.0).is_new for seq in range(1, 101)].count(True)
    )
    store.close()


def test_two_processes_write_the_same_run(store: Store, world: Any, tmp_path: Path) -> None:
    run = world.run()
    out = SPAWN.Queue()
    processes = [SPAWN.Process(target=_send, args=(tmp_path, world.tenant, run, name, out)) for name in "ab"]
    for process in processes:
        process.start()
    counts = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(counts) == 100
    assert world.head(run) == 100
    world.lease()
    assert [op.seq_id for op in world.runnable(200)] == list(range(101))


def _die(path: Path, point: str, tenant: TenantId, run: RunId, worker: WorkerId) -> None:
    crashpoints.arm(point)
    store = open_store(path)
    store.runs.lease(worker, "tiny", 10, 0.0)
    store.ops.enqueue(_op(tenant, run, 1, "req-x"), 1.0)
    store.ops.claim(worker, [OpId("req-x")], 1.0)
    store.ops.finish(worker, [Finished(OpId("req-x"), OpState.DONE, b"r")], 1.0)


@pytest.mark.parametrize(
    ("point", "head", "state"),
    [
        ("store.before_enqueue_commit", 0, None),
        ("store.after_enqueue_commit", 1, OpState.QUEUED),
        ("store.after_claim", 1, OpState.QUEUED),
        ("store.before_finish_commit", 1, OpState.QUEUED),
        ("store.after_finish_commit", 1, OpState.DONE),
    ],
)
def test_a_killed_process_leaves_whole_transactions(
    world: Any, tmp_path: Path, point: str, head: int, state: OpState | None
) -> None:
    run = world.run()
    process = SPAWN.Process(target=_die, args=(tmp_path, point, world.tenant, run, world.worker))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = world.store.workers.register("w0", "tiny", 10.0, world.now)
    assert world.head(run) == head
    assert world.store.ops.final_among([OpId("req-x")]) == ({OpId("req-x")} if state is OpState.DONE else set())
    assert (not world.put(run, 1).is_new) == (state is not None)
    if state is not None:
        assert world.state(OpId("req-x")) is state
    assert [r.run_id for r in world.lease(again)] == [run]
