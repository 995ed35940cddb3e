"""A run goes from one worker of a base to another, and either dies on the way: nothing is lost, done twice or changed.

The workers are processes over the fake engine (see lives.py). One holds all runs, since it was alone; another has come,
which has nothing to do. First one dies after the other at each point of the way, then both work at the same time, and
with `TINSMITH_TEST_DEATHS` a real server spreads what one of its workers took while the other was stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tinker import types

from tests.crash import givers, lives
from tests.crash.test_kill import connect, datum
from tests.service import running, until
from tinsmith.store import DATABASE_FILE
from tinsmith.types import OpState

OF_GIVING = {"give.after_choice", "give.after_release", "give.on_disk"}
GIVEN = [*sorted(OF_GIVING), "give.on_disk:3", "snapshot.after_row", "store.before_release_commit"]
TAKEN = ["store.before_lease_commit", "run.after_lease", "run.after_restore", "store.after_claim"]
NUM_WAITING = 60  # requests, below which the client asks for more while both work


def accounted(root: Path) -> Any:
    lives.run(lives.account, root, root / "account.json", givers.NUM_RUNS)
    return json.loads((root / "account.json").read_text())


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("calm") / "data"
    lives.run(givers.finish, root)
    found = accounted(root)
    assert found["findings"] == []
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which half of the runs have been given away, and nobody has taken them yet."""
    root = tmp_path_factory.mktemp("given") / "data"
    assert not lives.run(givers.give, root, "")
    return root


@pytest.mark.parametrize("point", GIVEN)
def test_who_gives_dies_at_this_point_and_nothing_is_lost(tmp_path: Path, calm: Any, point: str) -> None:
    root = tmp_path / "data"
    assert lives.run(givers.give, root, point), "the point was not passed"
    lives.run(givers.finish, root)
    assert accounted(root) == calm


@pytest.mark.parametrize("point", TAKEN)
def test_who_takes_dies_at_this_point_and_nothing_is_lost(tmp_path: Path, given: Path, calm: Any, point: str) -> None:
    root = tmp_path / "data"
    shutil.copytree(given, root, ignore=shutil.ignore_patterns("b?"))  # sockets of the dead
    assert lives.run(givers.take, root, point), "the point was not passed"
    lives.run(givers.finish, root)
    assert accounted(root) == calm


@pytest.mark.parametrize("point", ["", "give.on_disk:2"])
def test_two_workers_at_once_spread_what_one_of_them_has(tmp_path: Path, point: str) -> None:
    """The second comes when the first has all runs; if that one dies while it gives, it is started again.

    The client asks for more until runs have gone, however long processes take to start on this machine.
    """
    root = tmp_path / "data"
    with contextlib.closing(lives.Home(root, **givers.SETTINGS)) as home, contextlib.ExitStack() as held:

        def start(slot: str, crash_point: str) -> Any:
            process = lives.FORKING.Process(target=lives.die_and_tell, args=(givers.work, root, slot, crash_point))
            process.start()
            held.callback(process.join)
            held.callback(process.terminate)
            return process

        givers.ask(home, range(1))
        first = start(givers.A, point)
        until(
            lambda: givers.num_at(home, givers.A) == givers.NUM_RUNS and not home.store.overview.figures().waiting, 60
        )
        second = start(givers.B, "")
        until(lambda: any(row.slot == givers.B and row.is_ready for row in home.store.workers.list()), 60)
        num_steps = 1

        def asking_until(is_so: Callable[[], bool]) -> None:
            def asked() -> bool:
                nonlocal num_steps
                if sum(group.count for group in home.store.overview.figures().waiting) < NUM_WAITING:
                    num_steps += 4
                    givers.ask(home, range(num_steps))
                return is_so()

            until(asked, 120)

        if point:
            asking_until(lambda: first.exitcode is not None)
            assert first.exitcode == -signal.SIGKILL
            first = start(givers.A, "")
        asking_until(lambda: givers.num_at(home, givers.B) >= 2)
        until(lambda: not home.store.overview.figures().waiting and not home.store.overview.figures().running, 120)
        assert givers.num_at(home, givers.B) >= 2
        lives.see(home)
        for process in (first, second):
            process.terminate()
            process.join(30)
            assert process.exitcode == 0
        ops = [
            home.store.ops.get(tenant, op_id) for tenant, op_id in set(map(tuple, lives._lines(root / "acknowledged")))
        ]
        assert {op.state for op in ops} == {OpState.DONE}
        assert {op.owner for op in ops} == {givers.A, givers.B}
    with contextlib.closing(lives.Home(tmp_path / "quiet", **givers.SETTINGS)) as quiet:
        givers.ask(quiet, range(num_steps))
        lives.settle(quiet.worker())
        lives.see(quiet)
    found, right = accounted(root), accounted(tmp_path / "quiet")
    assert found == right


@pytest.mark.skipif(not os.environ.get("TINSMITH_TEST_DEATHS"), reason="make crash-points")
def test_a_server_spreads_what_one_worker_took_while_the_other_was_stopped(tmp_path: Path) -> None:
    """A minute, since a run stays where it came for thirty seconds; over the real engine, as requests have to wait."""
    flags = (
        "--device",
        "cpu",
        "--threads",
        "1",
        "--workers-per-base",
        "2",
        "--lease-s",
        "2",
        "--hang-timeout-s",
        "300",
    )
    with running(tmp_path / "data", *flags) as service:
        _, stopped = service.info()["worker_pids"].values()
        os.kill(stopped, signal.SIGSTOP)
        client = connect(service)
        time.sleep(2.5)
        clients = [client.create_lora_training_client("tinsmith/tiny", rank=4, seed=n).result() for n in range(8)]
        for run in clients:
            run.forward_backward([datum(1)], "cross_entropy").result()
        assert set(holders(service.data_dir).values()) == {8}
        os.kill(stopped, signal.SIGCONT)
        until(service.is_ready, 30)
        deadline, steps, spread = time.monotonic() + 120, 0, {}
        while time.monotonic() < deadline and min(spread.values(), default=0) < 2:
            pending = [run.forward_backward([datum(steps)] * 8, "cross_entropy") for run in clients for _ in range(4)]
            pending += [run.optim_step(types.AdamParams(learning_rate=0.01)) for run in clients]
            for each in pending:
                each.result()
            steps += 1
            spread = holders(service.data_dir) if len(holders(service.data_dir)) == 2 else {}
        assert min(spread.values(), default=0) >= 2, holders(service.data_dir)


def holders(data_dir: Path) -> dict[str, int]:
    """How many runs each worker holds."""
    with contextlib.closing(sqlite3.connect(data_dir / DATABASE_FILE)) as connection:
        query = "SELECT lease_owner, count(*) FROM runs WHERE lease_owner IS NOT NULL GROUP BY lease_owner"
        return dict(connection.execute(query).fetchall())
