"""The server dies while old runs are let go, audit entries deleted and usage moved: the next round goes on, nothing is
half gone, and no sum changes."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from tests.crash import lives
from tinsmith.store import DATABASE_FILE, open_as_it_is
from tinsmith.upkeep.verify import verify

OF_LETTING_GO = {
    "audit.before_trim_commit", "gone.after_mark", "gone.after_state", "gone.before_clear_commit",
    "gone.before_mark_commit", "gone.half_cleared", "usage.before_move_commit",
}  # fmt: skip


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of three runs, one of which has a checkpoint."""
    root = tmp_path_factory.mktemp("lived") / "data"
    lives.run(lives.live, root, "", range(3))
    with sqlite3.connect(root / DATABASE_FILE) as connection:
        tenant = connection.execute("SELECT tenant_id FROM tenants").fetchone()[0]
        connection.execute(
            "INSERT INTO audit (tenant_id, at, resource, event, details) VALUES (?, 1.0, 'project', 'project_x', '{}')",
            (tenant,),
        )
    return root


LATER = time.time() + 40 * 86400.0  # as in `lives.age`, by whose clock the tallies of today are old


def left(root: Path) -> Any:
    """(statuses of runs, files of each kind, usage by kind, audit events) of a directory that is sound."""
    with contextlib.closing(open_as_it_is(root / DATABASE_FILE)) as store:
        assert verify(store, lives.blobs_of(root), now=LATER).findings == []
    files = sorted(file.key.split("/")[2] for file in lives.blobs_of(root).files())
    both = "SELECT kind, quantity FROM usage UNION ALL SELECT kind, quantity FROM usage_days"
    with contextlib.closing(sqlite3.connect(root / DATABASE_FILE)) as connection:
        runs = connection.execute("SELECT model_seq_id, status FROM runs ORDER BY 1").fetchall()
        used = connection.execute(f"SELECT kind, sum(quantity) FROM ({both}) GROUP BY 1").fetchall()
        (num_hours,) = connection.execute("SELECT count(*) FROM usage").fetchone()
        events = [event for (event,) in connection.execute("SELECT event FROM audit ORDER BY num")]
    return runs, files, used, num_hours, events


@pytest.fixture(scope="module")
def calm(lived: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("calm") / "data"
    shutil.copytree(lived, root, ignore=shutil.ignore_patterns("b?"))
    before = left(root)
    assert not lives.run(lives.age, root, "")
    after = left(root)
    assert [status for _, status in after[0]] == ["ready", "gone", "gone"], "the first one has a checkpoint"
    assert after[2] == before[2]
    assert before[3] > after[3] == 0
    assert after[4] == ["project_run_let_go"] * 2
    return after


@pytest.mark.parametrize("point", sorted(OF_LETTING_GO))
def test_a_death_while_old_things_go_changes_nothing(tmp_path: Path, lived: Path, calm: Any, point: str) -> None:
    root = tmp_path / "data"
    shutil.copytree(lived, root, ignore=shutil.ignore_patterns("b?"))
    assert lives.run(lives.age, root, point), "the point was not passed"
    with contextlib.closing(open_as_it_is(root / DATABASE_FILE)) as store:
        assert verify(store, lives.blobs_of(root), now=LATER).findings == []
    assert not lives.run(lives.age, root, "")
    assert left(root) == calm
