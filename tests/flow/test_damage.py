"""Rows that can't be, a database that is lost, a backup that is damaged: found, named, and never made worse."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.flow.house import House
from tests.flow.test_keeping import file_of, flip, house, lived, remove
from tinsmith.cli import main as cli
from tinsmith.errors import ConfigError, CorruptError
from tinsmith.files.blobs import Blobs
from tinsmith.store import DATABASE_FILE, open_as_it_is, open_store
from tinsmith.store.rows import OpRow
from tinsmith.store.upkeep import Naming
from tinsmith.types import RunId
from tinsmith.upkeep.backup import back_up
from tinsmith.upkeep.verify import verify

__all__ = ["house", "lived"]

BEYOND_ITS_TENANT = """
INSERT INTO keys (key_id, tenant_id, name, digest, scope, created_at)
SELECT 'k1', tenant_id, '', 'x', 'full', 0 FROM tenants;
INSERT INTO tallies SELECT 'k1', period, kind, quantity + 1 FROM tallies
"""
IMPOSSIBLE = (
    ("UPDATE ops SET kind = 'dance' WHERE seq_id = 5", "its kind is no known one"),
    ("UPDATE ops SET state = 'asleep' WHERE seq_id = 5", "its state is no known one"),
    ("UPDATE runs SET status = 'asleep'", "its status is no known one"),
    ("UPDATE checkpoints SET kind = 'asleep'", "its kind is no known one"),
    ("UPDATE ops SET meta = '{' WHERE seq_id = 5", "its meta can't be read"),
    ("UPDATE runs SET spec = substr(spec, 2)", "its spec can't be read"),
    ("UPDATE sessions SET tags = '['", "its tags can't be read"),
    ("UPDATE samplers SET spec = '{' WHERE spec IS NOT NULL", "its spec can't be read"),
    ("UPDATE checkpoints SET user_metadata = ''", "its user_metadata can't be read"),
    (
        "UPDATE ops SET payload_blob = replace(payload_blob, op_id, 'req-0') WHERE seq_id = 5",
        "another request's file",
    ),
    (
        "UPDATE ops SET result_blob = replace(result_blob, op_id, 'req-0') WHERE seq_id = 1",
        "another request's file",
    ),
    ("UPDATE ops SET routes_blob = replace(routes_blob, op_id, 'req-0')", "its routes are another request's file"),
    ("UPDATE runs SET snapshot_blob = previous_blob", "its snapshot is a file of another run or moment"),
    ("UPDATE runs SET previous_blob = snapshot_blob", "the snapshot before its newest is a file of another"),
    ("UPDATE checkpoints SET sha256 = 'x' || sha256", "its digest is not that of its file"),
    ("INSERT INTO dead_blobs SELECT previous_blob, 0 FROM runs", "a snapshot of it is to be deleted"),
    ("UPDATE ops SET finished_at = NULL WHERE seq_id = 1", "the time of its end don't fit together"),
    ("UPDATE ops SET finished_at = 1 WHERE seq_id = 5", "the time of its end don't fit together"),
    ("UPDATE ops SET state = 'failed' WHERE seq_id = 1", "nothing says why"),
    ("UPDATE ops SET state = 'running', owner = NULL WHERE seq_id = 5", "nobody does it"),
    ("DELETE FROM ops WHERE seq_id = 5", "requests are missing in its log"),
    ("DELETE FROM ops WHERE seq_id = 4", "requests are missing in its log"),
    ("UPDATE runs SET head_seq = head_seq - 1", "requests of it have arrived that it doesn't know of"),
    ("UPDATE runs SET max_seq = max_seq - 1", "requests of it have arrived that it doesn't know of"),
    ("UPDATE ops SET is_expired = 1 WHERE seq_id = 5", "its result is said to be gone"),
    ("UPDATE tenants SET weight = 0", "its weight is no share"),
    ("UPDATE usage SET quantity = -1", "it is less than nothing"),
    ("DROP TABLE tallies", "the table is gone"),
    ("DROP INDEX ix_ops_queue", "its index ix_ops_queue is gone"),
    ("ALTER TABLE tenants DROP COLUMN weight", "its column weight is gone"),
    ("UPDATE tallies SET quantity = quantity + 1", "is not what the ledger says"),
    ("DELETE FROM tallies", "is not what the ledger says"),
    ("UPDATE usage SET quantity = quantity + 1", "is not what the ledger says"),
    ("INSERT INTO tallies SELECT 'nobody', period, kind, quantity FROM tallies", "is not what the ledger says"),
    (BEYOND_ITS_TENANT, "is not what the ledger says"),
    ("INSERT INTO replays (op_id, num_begun) VALUES ('req-0', 1)", "there is no such request"),
)
MENDABLE = (
    "DROP INDEX ix_ops_queue",
    "UPDATE tallies SET quantity = quantity + 1",
    "DELETE FROM tallies",
    "INSERT INTO tallies SELECT 'nobody', period, kind, quantity FROM tallies",
    "INSERT INTO replays (op_id, num_begun) VALUES ('req-0', 1)",
    BEYOND_ITS_TENANT,
)
DROPPED = ("runs.damaged_at", "ops.routes_bytes", "checkpoints.user_metadata", "tallies.quantity", "replays.num_begun")


def test_rows_that_can_not_be_are_found(house: House, lived: object, tmp_path: Path) -> None:
    house.close()
    for harm, problem in IMPOSSIBLE:
        shutil.copy(house.root / DATABASE_FILE, tmp_path)
        with contextlib.closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as connection, connection:
            connection.executescript(harm)
        with contextlib.closing(open_as_it_is(tmp_path / DATABASE_FILE)) as store:
            assert any(problem in fault.problem for fault in store.upkeep.faults(time.time())), harm


def test_what_the_rest_of_the_database_says_is_made_right_again(house: House, lived: object) -> None:
    tally = "SELECT scope, period, kind, quantity FROM tallies ORDER BY 1, 2, 3"
    indices = "SELECT name FROM sqlite_master WHERE type = 'index' ORDER BY 1"
    house.close()
    before = [rows(house, query) for query in (tally, indices)]
    assert before[0], "the ledger was tallied"
    for harm in MENDABLE:
        with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection, connection:
            connection.executescript(harm)
        found = CliRunner().invoke(cli.app, ["verify", str(house.root), "--json"])
        assert found.exit_code == 1, harm
        assert all("--repair" in each["cure"] for each in json.loads(found.output)["findings"]), harm
        repaired = CliRunner().invoke(cli.app, ["verify", str(house.root), "--repair", "--json"])
        assert repaired.exit_code == 0, repaired.output
        assert json.loads(repaired.output)["findings"]
        assert json.loads(CliRunner().invoke(cli.app, ["verify", str(house.root), "--json"]).output)["findings"] == []
        assert harm is BEYOND_ITS_TENANT or [rows(house, query) for query in (tally, indices)] == before, harm


def test_a_ledger_that_says_less_than_nothing_corrects_no_tally(house: House, lived: object) -> None:
    house.close()
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE usage SET quantity = -1")
    tally = "SELECT * FROM tallies ORDER BY 1, 2, 3"
    before = rows(house, tally)
    assert CliRunner().invoke(cli.app, ["verify", str(house.root), "--repair"]).exit_code == 1
    assert rows(house, tally) == before


@pytest.mark.parametrize("column", DROPPED)
def test_a_column_that_is_gone_is_reported_and_nothing_raises(house: House, lived: object, column: str) -> None:
    house.close()
    table, _, name = column.partition(".")
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection, connection:
        connection.execute(f"ALTER TABLE {table} DROP COLUMN {name}")
    files = sorted(path for path in (house.root / "blobs").rglob("*") if path.is_file())
    for flags in ([], ["--repair"]):
        result = CliRunner().invoke(cli.app, ["verify", str(house.root), "--json", *flags])
        assert result.exit_code == 1, result.exception
        report = json.loads(result.output)
        assert report["is_cut_short"]
        assert [each["problem"] for each in report["findings"]] == [f"its column {name} is gone"]
    assert sorted(path for path in (house.root / "blobs").rglob("*") if path.is_file()) == files


def test_what_is_whole_of_a_damaged_backup_comes_back_if_asked_for(
    house: House, lived: tuple[RunId, OpRow], tmp_path: Path
) -> None:
    _, op = lived
    remove(file_of(house, Naming.CHECKPOINT))  # so it was when the backup was made
    assert len(back_up(house.root, tmp_path / "backup").damaged) == 1
    flip(tmp_path / "backup" / file_of(house, Naming.SNAPSHOT).relative_to(house.root))
    command = ["restore", str(tmp_path / "backup"), str(tmp_path / "data2")]
    assert isinstance(CliRunner().invoke(cli.app, command).exception, CorruptError)
    restored = CliRunner().invoke(cli.app, [*command, "--leave-out-damaged"])
    assert restored.exit_code == 1
    assert restored.output.count("damaged: ") == restored.output.count("; left out") == 2
    assert "tinsmith verify" in restored.output
    with contextlib.closing(open_as_it_is(tmp_path / "data2" / DATABASE_FILE)) as store:
        found = verify(store, Blobs(tmp_path / "data2" / "blobs")).findings
        assert sorted(finding.owner.partition(" of ")[0] for finding in found) == ["checkpoint", "snapshot"]
        assert store.ops.get(house.tenant, op.id).result_blob is not None


@pytest.mark.parametrize("loss", [remove, lambda path: path.write_bytes(b"")])
def test_a_lost_database_is_not_made_anew_beside_the_files_that_it_named(
    house: House, lived: object, loss: Callable[[Path], None]
) -> None:
    """The new one would name none of them, and the janitor would take them for leftovers."""
    house.close()
    loss(house.root / DATABASE_FILE)
    with pytest.raises(ConfigError, match="restore a backup"):
        open_store(house.root)
    (house.root / "blobs").rename(house.root.with_name("aside"))
    open_store(house.root).close()


def rows(house: House, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection:
        return connection.execute(query).fetchall()
