"""Power is lost: of what was written, only that is left which was synced before.

A shim notes what each fsync of a worker's process makes durable, beside what its client was told (power_loss.c). The
notes are cut at any place, the directory is built again as the disk would have it then, and a new worker goes on from
there. Claims and heartbeats, of which nobody was told, may be lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash import lives
from tinsmith.store import DATABASE_FILE, open_as_it_is, open_store
from tinsmith.upkeep.verify import verify

HERE = Path(__file__).parent
CUTS = int(os.environ.get("TINSMITH_TEST_DEATHS", "5"))

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the shim with")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "power_loss.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wall", "-O1", "-o", str(library), str(HERE / "power_loss.c"), "-ldl"], check=True
    )
    return library


class Disk:
    """A data directory and the notes of what of it was durable when."""

    def __init__(self, place: Path, shim: Path, synchronous: str) -> None:
        self.root, self.notes = place / "data", place / "notes"
        self.root.mkdir()
        self.notes.mkdir()
        env = {"LD_PRELOAD": str(shim), "POWER_LOSS_NOTES": str(self.notes), "PYTHONPATH": os.pathsep.join(sys.path)}
        code = f"from tests.crash.lives import live_noted; live_noted({str(self.root)!r}, {synchronous!r})"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **env}, cwd=HERE.parents[1])
        self.index = (self.notes / "index").read_text().splitlines()

    def lose_power(self, at: int, place: Path) -> None:
        """Build in `place` what the disk had when the index had `at` lines, and what the client knew by then."""
        contents: dict[int, int] = {}
        entries: dict[int, int] = {}
        known: dict[str, list[str]] = {lives.ACKNOWLEDGED: [], lives.SEEN: []}
        for line in self.index[:at]:
            kind, _, rest = line.partition(" ")
            if kind in known:
                known[kind].append(rest)
                continue
            number, inode = map(int, rest.split())
            (entries if kind == "D" else contents)[inode] = number
        place.mkdir()
        self._rebuild(self.root.stat().st_ino, place, contents, entries)
        shutil.copy(self.root / lives.WHO, place / lives.WHO)
        (place / lives.HARMED).touch()  # no file is damaged besides
        for name, lines in known.items():
            (place / name).write_text("".join(f"{line}\n" for line in lines))

    def _rebuild(self, inode: int, place: Path, contents: dict[int, int], entries: dict[int, int]) -> None:
        for child, kind, name in self._entries(entries.get(inode)):
            if kind == "d":
                (place / name).mkdir()
                self._rebuild(child, place / name, contents, entries)
            elif child in contents:
                shutil.copy(self.notes / str(contents[child]), place / name)
            else:
                (place / name).touch()  # its name is durable and nothing of its content

    def _entries(self, number: int | None) -> Iterator[tuple[int, str, str]]:
        lines = [] if number is None else (self.notes / str(number)).read_text().splitlines()
        for line in lines:
            inode, kind, name = line.split(" ", 2)
            if name not in (".", "..", lives.WHO, lives.ACKNOWLEDGED, lives.SEEN, lives.HARMED):
                yield int(inode), kind, name


def lost(place: Path) -> list[Any]:
    """Acknowledged requests that the directory doesn't have."""
    told = [json.loads(line) for line in (place / lives.ACKNOWLEDGED).read_text().splitlines()]
    with contextlib.closing(open_store(place)) as store:
        return [(tenant, op_id) for tenant, op_id in told if not lives.has(store, tenant, op_id)]


@pytest.fixture(scope="module")
def disk(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"), shim, "FULL")


def test_what_was_acknowledged_survives_a_loss_of_power(disk: Disk, tmp_path: Path) -> None:
    lives.run(lives.account, disk.root, tmp_path / "calm.json")
    calm = json.loads((tmp_path / "calm.json").read_text())
    begun = next(at for at, line in enumerate(disk.index) if line.startswith(lives.ACKNOWLEDGED))
    draw = random.Random(1)
    for cut in sorted(draw.sample(range(begun + 1, len(disk.index)), CUTS)):
        place = tmp_path / str(cut)
        disk.lose_power(cut, place)
        assert lost(place) == [], f"after {cut} lines"
        with contextlib.closing(open_as_it_is(place / DATABASE_FILE)) as store:
            assert verify(store, lives.blobs_of(place)).findings == [], f"after {cut} lines"
        lives.run(lives.live, place, "", range(8))
        lives.run(lives.account, place, place / "account.json")
        account = json.loads((place / "account.json").read_text())
        assert account == calm, f"after {cut} lines"


def test_every_request_is_durable_when_it_is_acknowledged(disk: Disk, tmp_path: Path) -> None:
    """At the very moment: the notes are cut behind each tenth acknowledgement."""
    told = [at for at, line in enumerate(disk.index) if line.startswith(lives.ACKNOWLEDGED)]
    for at in told[::10]:
        disk.lose_power(at + 1, tmp_path / str(at))
        assert lost(tmp_path / str(at)) == []


def test_without_waiting_for_the_disk_requests_would_be_lost(shim: Path, tmp_path: Path) -> None:
    """The shim sees what it has to see: SQLite told to commit without an fsync loses what was acknowledged."""
    careless = Disk(tmp_path, shim, "NORMAL")
    last = max(at for at, line in enumerate(careless.index) if line.startswith(lives.ACKNOWLEDGED))
    careless.lose_power(last + 1, tmp_path / "rebuilt")
    assert lost(tmp_path / "rebuilt")
