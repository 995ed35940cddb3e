"""A data directory as a whole: verified, repaired, copied while it is in use, and restored."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from tests.flow.house import House, settle
from tinsmith.cli import main as cli
from tinsmith.errors import ConfigError, CorruptError, GoneError
from tinsmith.files.blobs import TEMPORARY, Blobs
from tinsmith.files.datadir import DataDir
from tinsmith.store import DATABASE_FILE, open_as_it_is
from tinsmith.store.rows import OpRow
from tinsmith.store.upkeep import Naming
from tinsmith.types import BlobKey, CheckpointKind, RunId, SamplerId
from tinsmith.upkeep.backup import MANIFEST, back_up, restore
from tinsmith.upkeep.verify import Report, verify

HOUR = 3600.0


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "data", inline_bytes=1, snapshot_debt_bytes=1)) as house:
        yield house


@pytest.fixture
def lived(house: House) -> tuple[RunId, OpRow]:
    """A run with every kind of file, and a request with a result."""
    run = house.create_run()
    op = house.forward_backward(run, 1, [1, 2])
    house.optim_step(run, 2)
    house.save(run, 3, "kept")
    house.save_sampler(run, 4, SamplerId(f"{house.session}:sample:0"))
    house.sample(house.sampler(number=1), 1, records_routes=True)
    settle(house.worker())
    house.forward_backward(run, 5, [3, 4])
    return run, op


def check(house: House, *, is_repairing: bool = False, now: float | None = None) -> Report:
    return verify(house.store, house.blobs, is_repairing=is_repairing, now=now)


def file_of(house: House, naming: Naming) -> Path:
    blob = next(found.blob for found in house.store.upkeep.references() if found.naming is naming)
    return house.root / "blobs" / blob


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def test_what_was_left_alone_is_sound(house: House, lived: object) -> None:
    report = check(house, now=time.time() + 2 * HOUR)
    assert report.is_sound
    assert not report.leftovers
    seen = {found.naming for found in house.store.upkeep.references()}
    assert seen == set(Naming) - {Naming.LOSS, Naming.PIN}
    assert report.num_files == len({found.blob for found in house.store.upkeep.references()})


@pytest.mark.parametrize("harm", [flip, cut, remove])
@pytest.mark.parametrize(
    "naming", [Naming.PAYLOAD, Naming.RESULT, Naming.ROUTES, Naming.SNAPSHOT, Naming.SAMPLER, Naming.CHECKPOINT]
)
def test_each_harm_to_each_file_is_found_and_named(
    house: House, lived: object, naming: Naming, harm: Callable[[Path], None]
) -> None:
    harm(file_of(house, naming))
    report = check(house)
    assert not report.is_sound
    assert any(finding.owner.startswith(f"{naming} of ") and finding.cure for finding in report.findings)


def test_a_lost_result_is_given_up_by_name_and_all_else_stays(house: House, lived: tuple[RunId, OpRow]) -> None:
    run, op = lived
    remove(house.root / "blobs" / str(house.get(op).result_blob))
    report = check(house, is_repairing=True)
    assert report.is_sound
    assert [finding.owner for finding in report.findings] == [f"result of {op.id}"]
    with pytest.raises(GoneError):
        house.get(op)
    assert check(house).findings == []
    assert house.store.checkpoints.get(house.tenant, run, CheckpointKind.TRAINING, "kept")


def test_lost_routes_are_given_up_and_their_result_stays(house: House, lived: object) -> None:
    remove(file_of(house, Naming.ROUTES))
    report = check(house, is_repairing=True)
    assert report.is_sound
    assert [finding.owner.partition(" of ")[0] for finding in report.findings] == [Naming.ROUTES]
    assert check(house).findings == []


def test_leftovers_are_removed_and_nothing_that_a_row_names(house: House, lived: object) -> None:
    stray = house.blobs.put(BlobKey("tenants/t/payloads/req-1"), b"x")
    unfinished = house.root / "blobs" / "tenants" / f"{TEMPORARY}1"
    unfinished.write_bytes(b"half")
    assert not check(house).leftovers  # they may be under way
    assert {file.key for file in check(house, now=time.time() + 2 * HOUR).leftovers} == {
        stray.key,
        f"tenants/{TEMPORARY}1",
    }
    assert house.blobs.exists(stray.key)
    report = check(house, is_repairing=True)
    assert report.removed
    assert not house.blobs.exists(stray.key)
    assert not unfinished.exists()
    assert check(house, now=time.time() + 2 * HOUR) == Report(num_files=report.num_files, num_bytes=report.num_bytes)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        ("UPDATE ops SET payload_blob = NULL WHERE seq_id = 5", "its payload is gone"),
        ("UPDATE ops SET result_blob = NULL WHERE seq_id = 1 AND kind = 'forward_backward'", "its result is gone"),
        ("UPDATE ops SET tenant_id = 'other' WHERE seq_id = 5", "another tenant than its run"),
        ("UPDATE runs SET tenant_id = 'other'", "another tenant than its session"),
        ("UPDATE samplers SET tenant_id = 'other'", "another tenant than its session"),
        ("UPDATE checkpoints SET tenant_id = 'other'", "another tenant than its run"),
        ("UPDATE runs SET snapshot_seq = head_seq + 1", "don't fit together"),
        ("UPDATE runs SET pruned_seq = snapshot_seq + 1", "don't fit together"),
        ("UPDATE ops SET tenant_id = 'nobody' WHERE seq_id = 5", "names a row of tenants that is not there"),
    ],
)
def test_rows_at_odds_are_found(house: House, lived: object, harm: str, problem: str) -> None:
    other = house.store.tenants.create("other").tenant_id
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection, connection:
        connection.execute(harm.replace("'other'", f"'{other}'"))
    assert any(problem in finding.problem for finding in check(house).findings)


def test_a_file_of_another_tenant_is_no_sound_payload(house: House, lived: object) -> None:
    other = house.blobs.put(BlobKey("tenants/mallory/payloads/req-1"), b"x")
    with house.store._database.write() as conn:
        conn.execute(text("UPDATE ops SET payload_blob = :blob WHERE seq_id = 5"), {"blob": other.key})
    assert any("is another tenant's" in finding.problem for finding in check(house).findings)


def test_a_backup_restores_to_the_same_numbers(house: House, lived: tuple[RunId, OpRow], tmp_path: Path) -> None:
    run, op = lived
    copied = back_up(house.root, tmp_path / "backup")
    assert copied.damaged == ()
    house.optim_step(run, 6)
    settle(house.worker())  # after the backup
    expected = house.result(op)
    restore(tmp_path / "backup", tmp_path / "data2")
    again = House.__new__(House)
    again.__dict__ = house.__dict__ | {"root": tmp_path / "data2", "_open": []}
    again.store = open_as_it_is(tmp_path / "data2" / DATABASE_FILE)
    again.blobs = Blobs(tmp_path / "data2" / "blobs")
    with contextlib.closing(again):
        assert check(again).findings == []
        assert again.result(op) == expected
        again.optim_step(run, 6)
        settle(again.worker())  # and the request that was queued then
        assert (again.weights(run) == house.weights(run)).all()


def test_a_second_backup_copies_what_is_new_and_drops_what_nobody_names(
    house: House, lived: tuple[RunId, OpRow], tmp_path: Path
) -> None:
    target = tmp_path / "backup"
    first = back_up(house.root, target)
    assert first.num_new == first.num_files
    payload = file_of(house, Naming.PAYLOAD).relative_to(house.root)
    settle(house.worker())
    house.optim_step(lived[0], 6)
    settle(house.worker())
    second = back_up(house.root, target)
    assert 0 < second.num_new < second.num_files
    assert not (target / payload).exists()
    restore(target, tmp_path / "data2")


def test_a_second_backup_mends_what_was_damaged_in_the_first(house: House, lived: object, tmp_path: Path) -> None:
    """Though its size is what it was."""
    target = tmp_path / "backup"
    back_up(house.root, target)
    for naming in (Naming.SNAPSHOT, Naming.CHECKPOINT):
        flip(target / file_of(house, naming).relative_to(house.root))
    told: list[int] = []
    second = back_up(house.root, target, lambda done, total: told.append(done))
    assert second.num_new == 2
    assert told[-1] == second.num_bytes
    assert not second.damaged
    restore(target, tmp_path / "data2")


def test_a_backup_of_a_busy_directory_is_whole(house: House, tmp_path: Path) -> None:
    run = house.create_run()
    settle(house.worker())
    stop = threading.Event()

    def live() -> None:
        worker, seq = house.worker(), 0
        while not stop.is_set():
            for _ in range(3):
                seq += 1
                house.forward_backward(run, seq, [1, 2, 3])
            settle(worker)
            house.store.ops.expire_results(time.time() + 1, time.time())
            for key in house.store.checkpoints.collect(time.time() + HOUR):
                house.blobs.delete(key)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        for number in range(5):
            target = tmp_path / f"backup{number}"
            assert back_up(house.root, target).damaged == ()
            restore(target, tmp_path / f"data{number}")
            with contextlib.closing(open_as_it_is(tmp_path / f"data{number}" / DATABASE_FILE)) as store:
                assert verify(store, Blobs(tmp_path / f"data{number}" / "blobs")).findings == []
    finally:
        stop.set()
        thread.join()
    assert not [path for path in house.root.iterdir() if path.name.startswith(".backup-")]


def test_damage_at_the_source_is_named_and_the_rest_is_kept(house: House, lived: object, tmp_path: Path) -> None:
    flip(file_of(house, Naming.SNAPSHOT))
    remove(file_of(house, Naming.RESULT))
    copied = back_up(house.root, tmp_path / "backup")
    assert len(copied.damaged) == 2
    assert copied.num_files == len({found.blob for found in house.store.upkeep.references()}) - 2


@pytest.mark.parametrize("harm", [flip, cut, remove])
def test_a_damaged_backup_is_refused_and_leaves_nothing(
    house: House, lived: object, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    back_up(house.root, tmp_path / "backup")
    harm(tmp_path / "backup" / file_of(house, Naming.SNAPSHOT).relative_to(house.root))
    with pytest.raises(CorruptError, match=r"is damaged.*--leave-out-damaged"):
        restore(tmp_path / "backup", tmp_path / "data2")
    assert list((tmp_path / "data2").iterdir()) == []


@pytest.mark.parametrize("num_bytes", [None, 0, 1, -1])
def test_a_backup_without_its_database_is_no_new_directory(house: House, tmp_path: Path, num_bytes: int | None) -> None:
    """What is missing at the end of a database SQLite takes for zeros, and less than a page for a new one."""
    back_up(house.root, tmp_path / "backup")
    file = tmp_path / "backup" / DATABASE_FILE
    whole = file.read_bytes()
    file.unlink()
    if num_bytes is not None:
        file.write_bytes(whole[:num_bytes])
    for is_leaving_out_damaged in (False, True):
        with pytest.raises(CorruptError, match="missing, empty or cut off"):
            restore(tmp_path / "backup", tmp_path / "data2", is_leaving_out_damaged=is_leaving_out_damaged)
    assert not (tmp_path / "data2").exists()


def test_a_place_that_can_not_be_made_is_refused_by_name(house: House, tmp_path: Path) -> None:
    back_up(house.root, tmp_path / "backup")
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below"):
        with pytest.raises(ConfigError, match=r"is a file|can't be made"):
            back_up(house.root, place)
        with pytest.raises(ConfigError, match=r"is a file|can't be made"):
            restore(tmp_path / "backup", place)


def test_what_may_not_be_written_over_is_refused(house: House, lived: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies in the data directory itself"):
        back_up(house.root, house.root / "backup")
    with pytest.raises(ConfigError, match="is no data directory"):
        back_up(tmp_path / "nothing", tmp_path / "backup")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex is in it"):
        back_up(house.root, tmp_path / "precious")
    back_up(house.root, tmp_path / "backup")
    with pytest.raises(ConfigError, match="is not empty"):
        restore(tmp_path / "backup", house.root)
    (tmp_path / "backup" / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="was not finished"):
        restore(tmp_path / "backup", tmp_path / "data2")


def test_keys_are_copied_for_their_owner_alone(house: House, lived: object, tmp_path: Path) -> None:
    for name in ("signing.key", "admin.key"):
        (house.root / name).write_text("secret")
    back_up(house.root, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "data2")
    for place in ("backup", "data2"):
        for name in ("signing.key", "admin.key"):
            assert (tmp_path / place / name).read_text() == "secret"
            assert (tmp_path / place / name).stat().st_mode & 0o077 == 0


def open_to_others(*places: Path) -> list[Path]:
    return [path for place in places for path in place.rglob("*") if path.stat().st_mode & 0o077]


def test_a_backup_is_its_owners_alone(house: House, lived: object, tmp_path: Path) -> None:
    """Whatever the umask is, and where the directory was there before and others may enter it."""
    backup, data2 = tmp_path / "backup", tmp_path / "data2"
    before = os.umask(0o022)
    try:
        for place in (backup, data2):
            place.mkdir()
        back_up(house.root, backup)
        restore(backup, data2)
        with contextlib.closing(open_as_it_is(data2 / DATABASE_FILE)) as store:
            store.mends.mend(time.time())  # with what SQLite lays beside the database
            assert len(list(data2.glob(f"{DATABASE_FILE}*"))) > 1
            assert open_to_others(backup, data2) == []
    finally:
        os.umask(before)
    assert backup.stat().st_mode & 0o777 == 0o755


def test_so_is_a_database_made_by_a_migration(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert CliRunner().invoke(cli.app, ["migrate", "--data-dir", str(tmp_path)]).exit_code == 0
    finally:
        os.umask(before)
    assert (tmp_path / DATABASE_FILE).is_file()
    assert open_to_others(tmp_path) == []


def test_a_backup_that_was_open_to_others_is_closed(house: House, lived: object, tmp_path: Path) -> None:
    back_up(house.root, tmp_path / "backup")
    for path in (tmp_path / "backup" / DATABASE_FILE, tmp_path / "backup" / "blobs"):
        path.chmod(path.stat().st_mode | 0o055)
    back_up(house.root, tmp_path / "backup")
    assert open_to_others(tmp_path / "backup") == []


def test_the_commands(house: House, lived: object, tmp_path: Path) -> None:
    run = CliRunner().invoke
    sound = run(cli.app, ["verify", str(house.root)])
    assert sound.exit_code == 0, sound.output
    assert "all is sound" in sound.output
    assert run(cli.app, ["backup", str(house.root), str(tmp_path / "b")]).exit_code == 0
    made = run(cli.app, ["restore", str(tmp_path / "b"), str(tmp_path / "data2")])
    assert made.exit_code == 0
    assert "tinsmith serve --data-dir" in made.output
    remove(file_of(house, Naming.RESULT))
    damaged = run(cli.app, ["verify", str(house.root), "--json"])
    assert damaged.exit_code == 1
    assert json.loads(damaged.stdout)["is_sound"] is False
    repaired = run(cli.app, ["verify", str(house.root), "--repair"])
    assert repaired.exit_code == 0, repaired.output
    assert "repaired" in repaired.output


def test_a_directory_that_is_served_is_not_repaired(house: House, lived: object, tmp_path: Path) -> None:
    with DataDir(house.root).locked(tmp_path / "sockets"):
        refused = CliRunner().invoke(cli.app, ["verify", str(house.root), "--repair"])
        assert isinstance(refused.exception, ConfigError)
        assert CliRunner().invoke(cli.app, ["verify", str(house.root)]).exit_code == 0


def test_an_older_schema_is_told_to_migrate(house: House, lived: object) -> None:
    with house.store._database.write() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    with pytest.raises(ConfigError, match="tinsmith migrate"):
        open_as_it_is(house.root / DATABASE_FILE)


def test_what_a_killed_backup_left_goes_with_the_next_and_one_at_work_is_left_alone(
    house: House, lived: object, tmp_path: Path
) -> None:
    killed, working = house.root / ".backup-killed", house.root / ".backup-working"
    for staging in (killed, working):
        staging.mkdir()
    descriptor = os.open(working, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    back_up(house.root, tmp_path / "backup")
    os.close(descriptor)
    assert not killed.exists()
    assert working.exists()
    half = tmp_path / "data2" / ".restore-killed"
    half.mkdir(parents=True)
    restore(tmp_path / "backup", tmp_path / "data2")
    assert not half.exists()
