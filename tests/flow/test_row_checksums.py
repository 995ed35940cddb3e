"""Rows of requests, payloads and results in them: a bit that flips there is found, named, and never computed with."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.flow.house import House, settle, train
from tinsmith.cli import main as cli
from tinsmith.errors import CorruptError, GoneError
from tinsmith.store import DATABASE_FILE
from tinsmith.store.checksums import whole_payload, whole_result
from tinsmith.store.rows import OpRow
from tinsmith.types import BlobKey, OpState, RunStatus
from tinsmith.upkeep.verify import verify


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "data")) as house:
        yield house


def execute(house: House, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection, connection:
        assert connection.execute(statement, values).rowcount > 0


def flip(house: House, op: OpRow, column: str, bit: int = 5) -> None:
    """Give this byte of it another bit."""
    stored = bytearray(getattr(house.get(op), column))
    stored[len(stored) // 2] ^= 1 << bit
    execute(house, f"UPDATE ops SET {column} = ? WHERE op_id = ?", bytes(stored), op.id)


def a_life(house: House) -> list[OpRow]:
    """A pass and a step that are done, and a pass that waits; all of it in rows."""
    run = house.create_run()
    ops = train(house, run, range(1))
    settle(house.worker())
    ops.append(house.forward_backward(run, 3, [3, 4]))
    return ops


@pytest.mark.parametrize("bit", range(8))
def test_a_bit_that_flipped_in_a_row_is_found_and_named(house: House, bit: int) -> None:
    done, _, waiting = a_life(house)
    assert verify(house.store, house.blobs).findings == []
    flip(house, waiting, "payload", bit)
    flip(house, done, "payload", bit)
    flip(house, done, "result", bit)
    report = verify(house.store, house.blobs)
    assert not report.is_sound
    assert sorted(finding.owner for finding in report.findings) == sorted(
        [f"payload of {waiting.id}", f"payload of {done.id}", f"result of {done.id}"]
    )
    assert all("in its row" in finding.problem and finding.cure for finding in report.findings)


def test_a_payload_that_became_a_text_is_found_and_stops_nobody(house: House) -> None:
    """One bit of a row's header does that; its bytes are the same, and needn't be a text that can be read."""
    *_, waiting = a_life(house)
    other = house.forward_backward(house.create_run(seed=2), 1, [9])
    broken = house.forward_backward(other.run_id, 2, [9])
    execute(house, "UPDATE ops SET payload = CAST(payload AS TEXT) WHERE op_id = ?", waiting.id)
    execute(house, "UPDATE ops SET payload = CAST(x'ff' || payload AS TEXT) WHERE op_id = ?", broken.id)
    found = {finding.owner for finding in verify(house.store, house.blobs).findings}
    assert {f"payload of {waiting.id}", f"payload of {broken.id}"} <= found
    settle(house.worker())
    assert [house.get(op).state for op in (waiting, other, broken)] == [OpState.DONE, OpState.DONE, OpState.FAILED]


def test_a_damaged_result_in_a_row_is_given_up_by_a_repair_and_a_payload_is_not(house: House) -> None:
    done, step, waiting = a_life(house)
    flip(house, done, "result")
    flip(house, waiting, "payload")
    report = verify(house.store, house.blobs, is_repairing=True)
    assert [finding.owner for finding in report.findings if finding.is_repaired] == [f"result of {done.id}"]
    with pytest.raises(GoneError):
        house.get(done)
    assert house.result(step)
    (left,) = verify(house.store, house.blobs).findings
    assert left.owner == f"payload of {waiting.id}"
    assert "restore a backup" in left.cure


def test_a_damaged_payload_fails_its_request_by_name_and_is_not_computed(house: House) -> None:
    *_, waiting = a_life(house)
    other = house.forward_backward(house.create_run(seed=2), 1, [9])
    flip(house, waiting, "payload")
    before = house.state(waiting.run_id)
    settle(house.worker())
    failure = house.get(waiting).failure
    assert failure is not None
    assert (failure.code, failure.category) == ("corrupt", "server")
    assert waiting.id in failure.message
    assert "backup" in failure.message
    assert house.get(other).state is OpState.DONE
    after = house.state(waiting.run_id)
    assert after.step == before.step
    assert all(np.array_equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())


def test_a_run_is_not_computed_again_from_a_damaged_row(house: House) -> None:
    done, *_ = a_life(house)
    settle(house.worker())
    whole = house.get(done).payload
    flip(house, done, "payload")
    house.engine.drop_run(done.run_id)
    after = house.forward_backward(done.run_id, 4, [9])
    settle(house.worker())
    failure = house.get(after).failure
    assert failure is not None
    assert (failure.code, failure.category) == ("corrupt", "server")
    assert house.store.runs.get(house.tenant, done.run_id).status is RunStatus.CORRUPTED
    execute(house, "UPDATE ops SET payload = ? WHERE op_id = ?", whole, done.id)
    healed = house.forward_backward(done.run_id, 5, [9])
    settle(house.worker())
    assert house.get(healed).state is OpState.DONE


def test_what_is_read_is_checked(house: House) -> None:
    done, *_ = a_life(house)
    assert whole_payload(house.get(done)) == house.get(done).payload
    assert whole_result(house.get(done)) == house.get(done).result
    flip(house, done, "result")
    with pytest.raises(CorruptError, match=done.id):
        whole_result(house.get(done))
    flip(house, done, "payload")
    with pytest.raises(CorruptError, match=done.id):
        whole_payload(house.get(done))


def test_rows_of_before_are_counted_and_go_on(house: House) -> None:
    *_, waiting = a_life(house)
    assert verify(house.store, house.blobs).num_unchecked == 0
    assert verify(house.store, house.blobs).num_unchecked_rows == 0
    execute(house, "UPDATE ops SET payload_crc = NULL, result_crc = NULL, row_crc = NULL")
    execute(house, "UPDATE runs SET row_crc = NULL")
    told = CliRunner().invoke(cli.app, ["verify", str(house.root)])
    assert told.exit_code == 0, told.output
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection:
        num, num_rows = connection.execute("SELECT count(payload) + count(result), count(*) FROM ops").fetchone()
        num_rows += connection.execute("SELECT count(*) FROM runs").fetchone()[0]
    assert num > 3
    assert f"{num_rows} requests and runs" in told.output
    assert f"{num} payloads and results in rows" in told.output
    assert json.loads(CliRunner().invoke(cli.app, ["verify", str(house.root), "--json"]).output)["num_unchecked"] == num
    settle(house.worker())
    assert house.get(waiting).state is OpState.DONE


BORN_WITH = (  # all but what a table's index or a check finds out besides
    "cost_tokens = cost_tokens + 1",
    "media = 'application/jsom'",
    "payload_bytes = payload_bytes + 1",
    "created_at = created_at + 1",
    "key_id = 'k'",
    "meta = json_set(meta, '$.blob', 'x')",
)


@pytest.mark.parametrize("change", BORN_WITH)
def test_what_never_changes_of_a_row_is_checked_whole(house: House, change: str) -> None:
    done, _, waiting = a_life(house)
    for op in (done, waiting):
        execute(house, f"UPDATE ops SET {change} WHERE op_id = ?", op.id)
    found = {finding.owner for finding in verify(house.store, house.blobs).findings if "its row" in finding.problem}
    assert found == {done.id, waiting.id}


def test_a_request_whose_row_was_changed_fails_by_name_and_stops_nobody(house: House) -> None:
    *_, waiting = a_life(house)
    other = house.forward_backward(house.create_run(seed=2), 1, [9])
    execute(house, "UPDATE ops SET meta = json_set(meta, '$.blob', 'x') WHERE op_id = ?", waiting.id)
    before = house.state(waiting.run_id)
    settle(house.worker())
    failure = house.get(waiting).failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert waiting.id in failure.message
    assert house.get(other).state is OpState.DONE
    assert house.state(waiting.run_id).step == before.step


UNREADABLE = (
    "meta = '{'",
    "meta = CAST(x'7bff7d' AS TEXT)",
    "media = CAST(x'ff' || media AS TEXT)",
    "key_id = CAST(x'ff' AS TEXT)",
    "meta = x'7bff7d'",
    "meta = 5",
    "meta = '[1]'",
)


@pytest.mark.parametrize("change", UNREADABLE)
def test_a_row_that_can_not_be_read_keeps_no_other_from_being_carried_out(house: House, change: str) -> None:
    *_, waiting = a_life(house)
    house.load(waiting.run_id, 4, BlobKey("tenants/t/checkpoints/x.0"))
    broken = house.sample(house.sampler(), 0)
    other = house.forward_backward(house.create_run(seed=2), 1, [9])
    execute(house, f"UPDATE ops SET {change} WHERE op_id = ?", broken.id)
    settle(house.worker())
    failure = house.get(broken).failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert [house.get(op).state for op in (waiting, other)] == [OpState.DONE, OpState.DONE]


def test_a_run_is_not_computed_again_from_a_row_that_was_changed(house: House) -> None:
    done, *_, waiting = a_life(house)
    settle(house.worker())
    execute(house, "UPDATE ops SET cost_tokens = cost_tokens + 1 WHERE op_id = ?", done.id)
    other = house.forward_backward(house.create_run(seed=2), 1, [9])
    after = house.forward_backward(done.run_id, 4, [9])
    settle(house.worker())
    failure = house.get(after).failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert house.store.runs.get(house.tenant, done.run_id).status is RunStatus.CORRUPTED
    assert house.get(other).state is OpState.DONE
    assert house.get(waiting).state is OpState.DONE


def test_a_run_whose_row_was_changed_is_given_up_by_name(house: House) -> None:
    """Its seed here, from which it was made."""
    done, *_, waiting = a_life(house)
    other = house.forward_backward(house.create_run(seed=2), 1, [9])
    execute(house, "UPDATE runs SET spec = json_set(spec, '$.seed', 7) WHERE run_id = ?", done.run_id)
    assert [finding.owner for finding in verify(house.store, house.blobs).findings] == [done.run_id]
    settle(house.worker())
    failure = house.get(waiting).failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert str(done.run_id) in failure.message
    assert house.get(other).state is OpState.DONE


def test_a_text_that_can_not_be_read_is_named_with_all_else(house: House) -> None:
    done, step, waiting = a_life(house)
    flip(house, waiting, "payload")
    for table, column in (("ops", "owner"), ("sessions", "sdk_version"), ("keys", "name"), ("runs", "key_id")):
        house.store.tenants.create_key(house.tenant, f"key {table}")
        execute(house, f"UPDATE {table} SET {column} = CAST(x'61ff' AS TEXT)")
    execute(house, "UPDATE ops SET op_id = CAST(x'ff' || op_id AS TEXT) WHERE op_id = ?", step.id)
    findings = verify(house.store, house.blobs).findings
    problems = {finding.owner.partition(" ")[0]: finding.problem for finding in findings}
    for table, column in (("ops", "owner"), ("sessions", "sdk_version"), ("keys", "name"), ("runs", "key_id")):
        assert f"{column} can't be read" in problems[table]
    assert any(finding.owner == f"payload of {waiting.id}" for finding in findings)
    assert any(f"\\xff{step.id}" in finding.owner for finding in findings)
    assert done.id not in {finding.owner for finding in findings}


def test_a_kind_that_nothing_knows_stops_its_own_run_alone(house: House) -> None:
    *_, waiting = a_life(house)
    other = house.forward_backward(house.create_run(seed=2), 1, [9])
    execute(house, "UPDATE ops SET kind = 'forwerd' WHERE op_id = ?", waiting.id)
    settle(house.worker())
    assert house.get(other).state is OpState.DONE
    assert waiting.id in "".join(finding.owner for finding in verify(house.store, house.blobs).findings)


@pytest.mark.parametrize("change", ["state = 'dome'", "kind = 'forwerd'", "media = CAST(x'ff' AS TEXT)"])
def test_a_row_that_can_not_be_read_keeps_no_other_from_being_polled(house: House, change: str) -> None:
    done, _, waiting = a_life(house)
    execute(house, f"UPDATE ops SET {change} WHERE op_id = ?", done.id)
    _, other = house.store.ops.get_all([(house.tenant, op.id) for op in (done, waiting)])
    assert isinstance(other, OpRow)


def test_a_row_with_a_word_that_nothing_knows_is_called_damaged(house: House) -> None:
    done, *_ = a_life(house)
    execute(house, "UPDATE ops SET state = 'dome' WHERE op_id = ?", done.id)
    row = house.get(done)
    assert row.failure is not None
    assert (row.state, row.failure.code, row.result) == (OpState.FAILED, "corrupt", None)
    assert done.id in row.failure.message
