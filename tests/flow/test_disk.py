"""Files that nothing names go, others stay; what a data directory takes is shown."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.flow.house import House, settle, train
from tinsmith.cli.main import app
from tinsmith.files.blobs import Blobs, checkpoint_key, payload_key, result_key, snapshot_key
from tinsmith.store.files import ROW_BYTES
from tinsmith.store.rows import NewCopy
from tinsmith.types import BlobKey, CheckpointKind, OpId, RunId, SamplerId
from tinsmith.upkeep.disk_use import KINDS, measure, size
from tinsmith.upkeep.janitor import LEFTOVER_AFTER_S, LOOK_EVERY_S, Leftovers
from tinsmith.upkeep.verify import verify


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path, inline_bytes=1)) as house:
        yield house


@pytest.fixture
def full(house: House) -> House:
    """With a file of each kind, and some requests that wait."""
    run = house.create_run()
    train(house, run, range(3))
    house.save(run, 7, "kept")
    sampler = SamplerId(f"{house.session}:sample:0")
    house.save_sampler(run, 8, sampler)
    worker = house.worker()
    settle(worker)
    worker.runs.snapshot_all()
    settle(worker)
    train(house, run, range(4, 6))
    house.sample(house.sampler(number=1), 0)
    return house


def age(house: House, keys: list[BlobKey] | None = None, seconds: float = LEFTOVER_AFTER_S + 60) -> None:
    """Let the files be so old."""
    for file in house.blobs.files():
        if keys is None or file.key in keys:
            path = house.root / "blobs" / file.key
            os.utime(path, (time.time() - seconds,) * 2)


def keys(blobs: Blobs) -> set[BlobKey]:
    return {file.key for file in blobs.files()}


def strays(house: House) -> list[BlobKey]:
    """Files that a process left that died before it could write their rows."""
    tenant = house.tenant
    made = (
        payload_key(tenant, OpId("req-lost")), result_key(tenant, OpId("req-lost")), checkpoint_key(tenant),
        snapshot_key(tenant, RunId("s:train:0"), 3),
    )  # fmt: skip
    return [house.blobs.put(key, b"lost").key for key in made]


def test_a_file_without_a_row_goes_after_two_looks(full: House) -> None:
    named = keys(full.blobs)
    lost = strays(full)
    age(full)
    janitor = Leftovers()
    assert janitor.sweep(full.store, full.blobs, time.time(), 0.0) == 0
    assert janitor.sweep(full.store, full.blobs, time.time(), LOOK_EVERY_S - 1) == 0
    assert janitor.sweep(full.store, full.blobs, time.time(), LOOK_EVERY_S) == len(lost)
    assert keys(full.blobs) == named
    assert verify(full.store, full.blobs).is_sound


def test_a_file_that_was_just_written_stays_whatever_the_clock_says(house: House) -> None:
    """A request's file is there before its row; the wall clock may jump in between."""
    janitor = Leftovers()
    now = time.time()
    assert janitor.sweep(house.store, house.blobs, now, 0.0) == 0
    (lost, *others) = strays(house)
    assert janitor.sweep(house.store, house.blobs, now, LOOK_EVERY_S) == 0
    assert janitor.sweep(house.store, house.blobs, now + 10 * LEFTOVER_AFTER_S, 2 * LOOK_EVERY_S) == 0
    assert keys(house.blobs) == {lost, *others}
    assert janitor.sweep(house.store, house.blobs, now + 10 * LEFTOVER_AFTER_S, 3 * LOOK_EVERY_S) == 4


def test_a_file_that_gets_its_row_between_two_looks_stays(house: House) -> None:
    janitor = Leftovers()
    run = house.create_run()
    settle(house.worker())
    before = keys(house.blobs)
    op = house.forward_backward(run, 1, [1, 2, 3])
    (payload,) = keys(house.blobs) - before
    assert op.payload_blob == payload
    age(house)
    with house.store._database.write() as conn:
        conn.exec_driver_sql("UPDATE ops SET payload_blob = NULL WHERE op_id = ?", (op.id,))
    assert janitor.sweep(house.store, house.blobs, time.time(), 0.0) == 0
    with house.store._database.write() as conn:
        conn.exec_driver_sql("UPDATE ops SET payload_blob = ? WHERE op_id = ?", (payload, op.id))
    assert janitor.sweep(house.store, house.blobs, time.time(), LOOK_EVERY_S) == 0
    assert payload in keys(house.blobs)


def test_nothing_that_verify_counts_as_named_is_an_orphan(full: House) -> None:
    named = {reference.blob for reference in full.store.upkeep.references()}
    assert {key.split("/")[2] for key in named} == {"payloads", "results", "snapshots", "checkpoints"}
    assert full.store.files.orphans(named) == set()
    assert full.store.files.orphans([*named, BlobKey("tenants/t/payloads/req-x.00")]) == {"tenants/t/payloads/req-x.00"}


def test_the_snapshot_before_the_newest_is_no_orphan(tmp_path: Path) -> None:
    with contextlib.closing(House(tmp_path, snapshot_debt_bytes=1)) as house:
        run = house.create_run()
        for step in range(3):
            train(house, run, range(step, step + 1))
            settle(house.worker())
        row = house.store.runs.get(house.tenant, run)
        assert row.previous_blob is not None
        assert house.store.files.orphans([row.previous_blob]) == set()


def test_a_file_that_only_an_uncovered_request_needs_is_no_orphan(full: House) -> None:
    (kept,), _ = full.store.checkpoints.list(full.tenant, 10, 0)
    full.load(kept.run_id, 13, kept.blob)
    full.store.checkpoints.delete(full.tenant, kept.run_id, kept.kind, kept.name)
    with full.store._database.write() as conn:
        conn.exec_driver_sql("DELETE FROM dead_blobs")
    assert full.store.files.orphans([kept.blob]) == set()


def test_every_byte_of_a_data_directory_is_shown_under_its_kind(full: House) -> None:
    use = measure(full.root, full.store, full.blobs)
    assert set(use.bytes_by_kind) == set(KINDS)
    assert all(use.bytes_by_kind[kind] > 0 for kind in KINDS if kind not in ("losses", "other", "routes"))
    whole = sum(path.stat().st_size for path in full.root.rglob("*") if path.is_file())
    assert use.total_bytes == whole
    kept = sum(row.size_bytes for row in full.store.ledger.storage(full.tenant, None, time.time()))
    assert use.bytes_by_kind["checkpoints"] == kept


def test_the_command_shows_it(full: House) -> None:
    shown = CliRunner().invoke(app, ["disk", str(full.root)])
    assert shown.exit_code == 0
    assert all(kind in shown.output for kind in KINDS)
    told = json.loads(CliRunner().invoke(app, ["disk", str(full.root), "--json"]).output)
    assert told["total"] == sum(told[kind] for kind in KINDS)
    assert told["free"] > 0
    missing = CliRunner().invoke(app, ["disk", str(full.root / "nothing")])
    assert "is no data directory" in str(missing.exception)


def test_sizes() -> None:
    assert [size(n) for n in (0, 1_500_000, 2_500_000_000)] == ["0.0 MB", "1.5 MB", "2.50 GB"]


def test_the_command_shows_what_each_tenant_takes(full: House) -> None:
    full.blobs.put(payload_key(full.tenant, OpId("req-more")), bytes(5000))
    shown = CliRunner().invoke(app, ["disk", str(full.root), "--json"])
    assert shown.exit_code == 0, shown.output
    tenants = json.loads(shown.output)["tenants"]
    assert set(tenants) == {"alice"}
    assert tenants["alice"] > 5000
    assert "tenant alice" in CliRunner().invoke(app, ["disk", str(full.root)]).output


def test_what_its_maker_let_go_of_counts_for_who_keeps_it(house: House) -> None:
    run, alice = house.create_run(), house.tenant
    house.save(run, 1, "kept")
    settle(house.worker())
    source = house.store.checkpoints.get(alice, run, CheckpointKind.TRAINING, "kept")
    house.be("bob")
    before = measure(house.root, house.store, house.blobs).bytes_by_tenant
    house.store.copies.create(NewCopy(house.tenant, source, project_id="p"), time.time())
    house.sampler(source.blob)
    shared = measure(house.root, house.store, house.blobs).bytes_by_tenant
    assert shared[alice] == before[alice]
    assert shared[house.tenant] - before[house.tenant] < source.size_bytes + 4 * ROW_BYTES
    house.store.checkpoints.delete(alice, run, CheckpointKind.TRAINING, "kept")
    left = measure(house.root, house.store, house.blobs).bytes_by_tenant
    assert left[alice] <= before[alice] - source.size_bytes
    assert left[house.tenant] == shared[house.tenant] + source.size_bytes
