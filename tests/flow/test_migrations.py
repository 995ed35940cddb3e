"""A data directory of every earlier schema, with a life's worth of data in it, is brought to this one and goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text

from tests.flow.house import House, settle, train
from tinsmith.errors import ConfigError
from tinsmith.files.blobs import Blobs
from tinsmith.files.datadir import DataDir
from tinsmith.store import DATABASE_FILE, open_store
from tinsmith.store.database import Database
from tinsmith.store.migrate import SCRIPTS
from tinsmith.types import CheckpointKind, OpState, RunId, SamplerId
from tinsmith.upkeep.backup import back_up, restore
from tinsmith.upkeep.verify import verify


def config() -> Config:
    made = Config()
    made.set_main_option("script_location", str(SCRIPTS))
    return made


REVISIONS = [script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()][::-1]
ORDER = ("tenants", "keys", "sessions", "workers", "runs", "samplers", "ops", "checkpoints", "custom_losses")


class Grown(House):
    """A house on a directory that is there already."""

    def be(self, name: str) -> None:
        self.tenant, self.session = json.loads((self.root / "who").read_text())


def a_life(root: Path) -> RunId:
    """A run with snapshots, payloads, a checkpoint, a sampler, results, usage and queued work."""
    with contextlib.closing(House(root, inline_bytes=100, snapshot_debt_bytes=300)) as house:
        (root / "who").write_text(json.dumps([house.tenant, house.session]))
        house.store.tenants.create_key(house.tenant, "key")
        run = house.create_run()
        train(house, run, range(3))
        settle(house.worker())
        house.save(run, 7, "kept")
        sampler = SamplerId(f"{house.session}:sample:0")
        house.save_sampler(run, 8, sampler)
        worker = house.worker()
        settle(worker)
        house.sample(sampler, 0)
        settle(worker)
        train(house, run, range(4, 6))  # requests 9 to 12
        settle(worker)
        house.forward_backward(run, 13, [7, 8])
        house.optim_step(run, 14)
        return run


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunId]:
    root = tmp_path_factory.mktemp("lived") / "data"
    return root, a_life(root)


@pytest.fixture(scope="module")
def expected(lived: tuple[Path, RunId], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("today") / "data"
    shutil.copytree(lived[0], root)
    return went_on(root, lived[1])


def went_on(root: Path, run: RunId) -> dict[str, Any]:
    """Carry out what is queued, and say what came of it all."""
    with contextlib.closing(Grown(root, inline_bytes=100)) as house:
        settle(house.worker())
        with contextlib.closing(sqlite3.connect(root / DATABASE_FILE)) as connection:
            ids = connection.execute("SELECT op_id, seq_id, kind FROM ops ORDER BY num").fetchall()
        ops = {(seq, kind): house.store.ops.get(house.tenant, op_id) for op_id, seq, kind in ids}
        assert all(op.state is OpState.DONE for op in ops.values())
        assert house.store.checkpoints.get(house.tenant, run, CheckpointKind.TRAINING, "kept").size_bytes > 0
        assert verify(house.store, house.blobs).findings == []
        state = house.state(run)
        tensors = {name: tensor.tobytes() for name, tensor in state.tensors.items()}
        return {"step": state.step, "ops": sorted(ops), **tensors}


def as_of(revision: str, lived: Path, root: Path) -> dict[str, list[dict[str, Any]]]:
    """A directory with the same data in the schema of that revision: what it has no column for isn't there."""
    shutil.copytree(lived, root, ignore=shutil.ignore_patterns(f"{DATABASE_FILE}*", "tinsmith.lock"))
    written: dict[str, list[dict[str, Any]]] = {}
    with contextlib.closing(Database(root / DATABASE_FILE)) as database, database.write() as conn:
        made = config()
        made.attributes["connection"] = conn
        command.upgrade(made, revision)
        source = sqlite3.connect(lived / DATABASE_FILE)
        source.row_factory = sqlite3.Row
        names = {row[0] for row in conn.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'"))}
        others = sorted(names - set(ORDER) - {"alembic_version"} - {n for n in names if n.startswith("sqlite_")})
        for table in (*ORDER, *others):
            if table not in names:
                continue
            columns = [row[1] for row in conn.execute(text(f"PRAGMA table_info({table})"))]
            rows = [dict(row) for row in source.execute(f"SELECT * FROM {table}")]
            if table == "keys":  # had a mark in place of a scope
                rows = [{**row, "is_admin": row["scope"] == "admin"} for row in rows]
            written[table] = [{name: row[name] for name in columns if name in row} for row in rows]
            for row in written[table]:
                marks = ", ".join(f":{name}" for name in row)
                conn.execute(text(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})"), row)
        source.close()
    return written


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_directory_of_this_schema_is_upgraded_on_start_and_goes_on(
    tmp_path: Path, lived: tuple[Path, RunId], expected: dict[str, Any], revision: str
) -> None:
    root = tmp_path / "data"
    written = as_of(revision, lived[0], root)
    assert {"tenants", "keys", "sessions", "runs", "samplers", "ops", "checkpoints"} <= {
        table for table, rows in written.items() if rows
    }
    open_store(root).close()
    with contextlib.closing(sqlite3.connect(root / DATABASE_FILE)) as connection:
        connection.row_factory = sqlite3.Row
        (version,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        assert version == REVISIONS[-1]
        for table, rows in written.items():
            now = [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
            kept = [{name: row[name] for name in before if name in row} for row, before in zip(now, rows, strict=True)]
            assert kept == [{name: row[name] for name in kept[0]} for row in rows] if rows else not kept, table
    with contextlib.closing(open_store(root)) as store:
        report = verify(store, Blobs(root / "blobs"))
    inline = {
        name: sum(row[name] is not None and row.get(f"{name}_crc") is None for row in written["ops"])
        for name in ("payload", "result")
    }
    assert report.findings == []
    assert report.num_unchecked == sum(inline.values())
    rows = written["ops"] + written["runs"]
    assert report.num_unchecked_rows == sum(row.get("row_crc") is None for row in rows)
    assert bool(report.num_unchecked_rows) is ("row_crc" not in written["ops"][0])
    assert all(inline.values()) or "payload_crc" in written["ops"][0]
    assert went_on(root, lived[1]) == expected
    with contextlib.closing(sqlite3.connect(root / DATABASE_FILE)) as connection:
        query = "SELECT count(*) FROM ops WHERE result IS NOT NULL AND result_crc IS NULL"
        assert connection.execute(query).fetchone() == (inline["result"],), "what was written since has checksums"


@pytest.mark.parametrize("revision", [REVISIONS[0], REVISIONS[-2]])
def test_a_backup_of_an_older_schema_is_restored_in_this_one(
    tmp_path: Path, lived: tuple[Path, RunId], expected: dict[str, Any], revision: str
) -> None:
    shutil.copytree(lived[0], tmp_path / "data")
    back_up(tmp_path / "data", tmp_path / "backup")
    as_of(revision, lived[0], tmp_path / "older")
    with contextlib.closing(sqlite3.connect(tmp_path / "older" / DATABASE_FILE)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    shutil.copy(tmp_path / "older" / DATABASE_FILE, tmp_path / "backup" / DATABASE_FILE)
    restore(tmp_path / "backup", tmp_path / "data2")
    assert {path.name for path in (tmp_path / "data2").iterdir()} == {"blobs", DATABASE_FILE}
    shutil.copy(lived[0] / "who", tmp_path / "data2")
    assert went_on(tmp_path / "data2", lived[1]) == expected


def test_there_is_no_way_back(tmp_path: Path, lived: tuple[Path, RunId]) -> None:
    """A database of a newer schema is left as it is."""
    shutil.copytree(lived[0], tmp_path / "data")
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999_of_tomorrow'")
    before = (tmp_path / "data" / DATABASE_FILE).read_bytes()
    with pytest.raises(ConfigError, match="upgrade tinsmith"):
        open_store(tmp_path / "data")
    assert (tmp_path / "data" / DATABASE_FILE).read_bytes() == before


def test_a_backup_that_was_repaired_can_be_made_again(tmp_path: Path, lived: tuple[Path, RunId]) -> None:
    shutil.copytree(lived[0], tmp_path / "data")
    back_up(tmp_path / "data", tmp_path / "backup")
    with DataDir(tmp_path / "backup").locked(tmp_path), contextlib.closing(open_store(tmp_path / "backup")) as store:
        store.upkeep.forget_previous("none")
    assert {"serve.lock", "tinsmith.turn"} <= {path.name for path in (tmp_path / "backup").iterdir()}
    assert back_up(tmp_path / "data", tmp_path / "backup").num_new == 0
