"""What is damaged at the source of a backup, or in a backup: named when it is copied, and all else comes along."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from typer.testing import CliRunner

from tests.flow.house import House
from tests.flow.test_keeping import cut, file_of, remove
from tests.flow.test_row_checksums import a_life, execute
from tests.flow.test_row_checksums import flip as flip_in_row
from tinsmith.cli import main as cli
from tinsmith.errors import CorruptError
from tinsmith.files.blobs import Blobs
from tinsmith.store import DATABASE_FILE, open_as_it_is
from tinsmith.store.upkeep import Naming
from tinsmith.types import BlobKey, OpState
from tinsmith.upkeep.backup import MANIFEST, back_up, restore
from tinsmith.upkeep.verify import verify

run = CliRunner().invoke


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "data")) as house:
        yield house


@pytest.fixture
def filed(tmp_path: Path) -> Iterator[House]:
    """One whose payloads and results are files."""
    with contextlib.closing(House(tmp_path / "data", inline_bytes=1, snapshot_debt_bytes=1)) as house:
        a_life(house)
        yield house


def test_what_is_sound_is_copied_without_a_word(house: House, tmp_path: Path) -> None:
    a_life(house)
    made = run(cli.app, ["backup", str(house.root), str(tmp_path / "backup")])
    assert (made.exit_code, made.stderr) == (0, "")


def test_damaged_rows_are_named_by_the_backup_and_refused_by_the_restore(house: House, tmp_path: Path) -> None:
    done, step, waiting = a_life(house)
    flip_in_row(house, waiting, "payload")
    flip_in_row(house, done, "result")
    source, backup, data2 = str(house.root), str(tmp_path / "backup"), str(tmp_path / "data2")
    made = run(cli.app, ["backup", source, backup])
    assert made.exit_code == 1
    for owner in (f"payload of {waiting.id}", f"result of {done.id}"):
        assert f"damaged: {owner}: it stands in its row" in made.stderr
    assert f"tinsmith verify {source}" in made.stderr
    assert (tmp_path / "backup" / MANIFEST).is_file()
    refused = run(cli.app, ["restore", backup, data2]).exception
    assert isinstance(refused, CorruptError)
    assert waiting.id in refused.message
    restored = run(cli.app, ["restore", backup, data2, "--leave-out-damaged"])
    assert restored.exit_code == 1
    assert restored.stderr.count("damaged: ") == 2
    assert f"tinsmith verify {data2}" in restored.stderr
    with contextlib.closing(open_as_it_is(tmp_path / "data2" / DATABASE_FILE)) as store:
        found = {finding.owner for finding in verify(store, Blobs(tmp_path / "data2" / "blobs")).findings}
        assert found == {f"payload of {waiting.id}", f"result of {done.id}"}
        assert store.ops.get(house.tenant, step.id).result == house.get(step).result


def test_rows_at_odds_are_named_by_the_backup(house: House, tmp_path: Path) -> None:
    *_, waiting = a_life(house)
    execute(house, "UPDATE ops SET kind = 'dance' WHERE op_id = ?", waiting.id)
    copied = back_up(house.root, tmp_path / "backup")
    assert f"{waiting.id}: its kind is no known one" in copied.damaged_rows
    assert not copied.is_whole


def test_a_table_that_can_not_be_read_keeps_nothing_else_from_the_backup(house: House, tmp_path: Path) -> None:
    done, *_ = a_life(house)
    house.close()
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'tallies'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with (house.root / DATABASE_FILE).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))
    made = run(cli.app, ["backup", str(house.root), str(tmp_path / "backup")])
    assert made.exit_code == 1
    assert "damaged: database: " in made.stderr
    with contextlib.closing(open_as_it_is(tmp_path / "backup" / DATABASE_FILE)) as store:
        assert store.ops.get(house.tenant, done.id).state is OpState.DONE


def test_a_file_that_can_not_be_read_is_left_out_and_named(
    filed: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = file_of(filed, Naming.RESULT).relative_to(filed.root / "blobs").as_posix()
    opened = Blobs.open

    def open_or_fail(self: Blobs, key: BlobKey) -> BinaryIO:
        file: Any = opened(self, key)
        if key == bad:
            file.close()
            raise OSError(errno.EIO, "Input/output error")
        return file  # type: ignore[no-any-return]

    monkeypatch.setattr(Blobs, "open", open_or_fail)
    copied = back_up(filed.root, tmp_path / "backup")
    assert copied.damaged == (f"the file {bad} can't be read (Input/output error); left out",)
    assert copied.num_files == len({found.blob for found in filed.store.upkeep.references()}) - 1


@pytest.mark.parametrize("harm", [cut, remove])
def test_an_earlier_backup_keeps_what_is_damaged_at_the_source_since(
    filed: House, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    assert back_up(filed.root, tmp_path / "backup").is_whole
    harm(file_of(filed, Naming.SNAPSHOT))
    filed.create_run(seed=2)
    copied = back_up(filed.root, tmp_path / "backup")
    (told,) = copied.damaged
    assert told.endswith("; the backup has it from before")
    assert restore(tmp_path / "backup", tmp_path / "data2").is_whole


def test_a_row_that_names_what_is_no_file_keeps_nothing_else_from_the_backup(filed: House, tmp_path: Path) -> None:
    execute(filed, "UPDATE ops SET result_blob = replace(result_blob, '-', ',') WHERE seq_id = 1")
    copied = back_up(filed.root, tmp_path / "backup")
    (told,) = copied.damaged
    assert told.endswith(" is missing; left out")
    assert copied.num_files == len({found.blob for found in filed.store.upkeep.references()}) - 1
