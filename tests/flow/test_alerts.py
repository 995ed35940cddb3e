"""What each alert is for, brought about: its series is there, with the labels that the rule chooses by."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.alerts import RULES, selected
from tests.flow.house import BASE, House, settle, train
from tests.flow.test_snapshots import files, flip, live, newest
from tests.unit.test_metrics import samples
from tinsmith.api.figures import Watched
from tinsmith.config import METRICS_DIR
from tinsmith.fake_engine import FakeEngine
from tinsmith.files.datadir import DataDir, ServerInfo
from tinsmith.ipc.heartbeat import Ear, Heart
from tinsmith.observe import series
from tinsmith.observe.metrics import Counting
from tinsmith.store import database
from tinsmith.worker import held

ELSEWHERE = {
    "TinsmithDown": "Prometheus' own series",
    "TinsmithHttpErrors": "tests/contract/test_refusals.py",
    "TinsmithOverload": "tests/contract/test_refusals.py",
}
BROUGHT: set[str] = set()
SLOT = "fake/base#0"


class Scene:
    """A house whose API and worker count in this process; `of` is what a rule sees."""

    def __init__(self, house: House, counting: Counting, heart: Heart) -> None:
        self.house = house
        self._watched = Watched(house.store, house.settings, counting, int, dict, Ear(heart.inherited_fd, 60.0))
        self.heart = heart

    def of(self, alert: str) -> list[list[tuple[dict[str, str], float]]]:
        return selected(alert, self._watched.text())

    def counted(self, name: str) -> float:
        return samples(self._watched.text())[name, ()]

    def serve(self, **info: Any) -> None:
        """As `tinsmith serve` tells of its processes."""
        DataDir(self.house.root).write_info(ServerInfo("0", "http://x", 1, 1, 1, {}, **info))


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    shared = tmp_path / "metrics"
    shared.mkdir()
    monkeypatch.setenv(METRICS_DIR, str(shared))
    monkeypatch.setattr("tinsmith.worker.watch.LEVELS_EVERY_S", 0.0)
    monkeypatch.setattr("tinsmith.api.figures.FRESH_S", 0.0)
    counting = Counting(series.TABLE, "worker-0", shared)
    counting.start()
    house = House(tmp_path / "house", snapshot_debt_bytes=1, inline_bytes=10)
    with contextlib.closing(house), contextlib.closing(Heart()) as heart:
        yield Scene(house, counting, heart)
    counting.stop()


def brings(*alerts: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    BROUGHT.update(alerts)
    return lambda test: test


@brings("TinsmithWorkerAway")
def test_a_dead_worker(scene: Scene) -> None:
    workers = scene.house.store.workers
    workers.set_ready(workers.register("0", BASE.name, 60.0, time.time()))
    scene.serve(places={"0": [BASE.name, "all"]})
    labels = {"worker": "0", "base_model": BASE.name, "role": "all"}
    assert scene.of("TinsmithWorkerAway") == [[(labels, 1)]]
    workers.vacate("0")
    assert scene.of("TinsmithWorkerAway") == [[(labels, 0)]]


@brings("TinsmithRestarts")
def test_a_process_that_dies_again_and_again(scene: Scene) -> None:
    scene.serve(restarts={"api": 0, "worker fake/base": 4})
    assert scene.of("TinsmithRestarts") == [[({"process": "api"}, 0), ({"process": "worker fake/base"}, 4)]]


@brings("TinsmithSupervisorSilent")
def test_a_supervisor_that_hangs(scene: Scene) -> None:
    ((_, silent_s),) = scene.of("TinsmithSupervisorSilent")[0]
    assert silent_s < 30
    os.pwrite(scene.heart.inherited_fd, struct.pack("=d", time.monotonic() - 90), 0)
    ((_, silent_s),) = scene.of("TinsmithSupervisorSilent")[0]
    assert silent_s >= 90


@brings("TinsmithNothingDone")
def test_requests_wait_and_others_are_cancelled(scene: Scene) -> None:
    house = scene.house
    house.create_run()
    sample = house.sample(house.sampler(), 0)
    house.store.endings.cancel(house.tenant, sample.id, time.time())
    queued, held_back, ended = scene.of("TinsmithNothingDone")
    assert sum(count for _, count in queued) == 1
    assert held_back == [({"tenant": "alice"}, 0)]
    assert ended == []
    assert samples(scene._watched.text())["tinsmith_ops_total", ("sample", "cancelled")] == 1
    settle(house.worker())
    assert scene.of("TinsmithNothingDone")[2] == [({"kind": "create", "outcome": "done"}, 1)]


@brings("TinsmithLongWait")
def test_a_request_that_waits_long(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    house = scene.house
    monkeypatch.setattr(house, "enqueue", lambda op: house.store.ops.enqueue(op, time.time() - 1000).row)
    house.sample(house.sampler(), 0)
    ((labels, seconds),) = scene.of("TinsmithLongWait")[0]
    assert labels == {"tenant": "alice"}
    assert 1000 <= seconds < 1100


@brings("TinsmithCorruptedRun")
def test_a_run_that_is_given_up(scene: Scene) -> None:
    house = scene.house
    run = house.create_run()
    train(house, run, range(2))
    settle(house.worker())
    assert scene.of("TinsmithCorruptedRun") == [[({"status": "corrupted"}, 0)]]
    assert scene.counted("tinsmith_corrupted_runs_total") == 0
    for path in files(house, "snapshots"):
        path.unlink()
    house.forward_backward(run, 5, [9])
    settle(house.worker())
    assert scene.of("TinsmithCorruptedRun") == [[({"status": "corrupted"}, 1)]]
    assert scene.counted("tinsmith_corrupted_runs_total") == 1


@brings("TinsmithDamagedSnapshot")
def test_a_damaged_snapshot(scene: Scene) -> None:
    house = scene.house
    run = house.create_run()
    live(house, run, 4)
    assert scene.of("TinsmithDamagedSnapshot") == [[({}, 0)]], "or the first one is no increase"
    flip(newest(house, run))
    worker = house.worker()
    train(house, run, range(4, 5))
    settle(worker)
    assert scene.of("TinsmithDamagedSnapshot") == [[({}, 1)]]


@brings("TinsmithSnapshotFailures")
def test_a_snapshot_that_cannot_be_written(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    house = scene.house
    monkeypatch.setattr(held, "FIRST_RETRY_S", 3600.0)
    assert scene.of("TinsmithSnapshotFailures") == [[({}, 0)]]
    put = house.blobs.put

    def full(key: Any, *args: Any) -> Any:
        if "/snapshots/" in key:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(key, *args)

    monkeypatch.setattr(house.blobs, "put", full)
    worker = house.worker()
    train(house, house.create_run(), range(1))
    settle(worker)
    assert scene.of("TinsmithSnapshotFailures") == [[({}, 1)]]


@brings("TinsmithServerFaults")
def test_a_fault_of_the_server(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    house = scene.house
    worker, run = house.worker(), house.create_run()
    settle(worker)
    assert scene.of("TinsmithServerFaults") == [[({"code": "internal"}, 0)]]

    def broken(items: Any) -> Any:
        raise RuntimeError("the engine broke")

    monkeypatch.setattr(house.engine, "start_pass", broken)
    op = house.forward_backward(run, 1, [1, 2, 3])
    settle(worker)
    failure = house.get(op).failure
    assert failure is not None
    assert failure.code == "internal"
    assert scene.of("TinsmithServerFaults") == [[({"code": "internal"}, 1)]]


@brings("TinsmithKvFull")
def test_samples_that_fill_the_memory(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "kv_bytes", property(lambda self: (960, 1000)))
    settle(scene.house.worker())
    used, again, free = scene.of("TinsmithKvFull")
    assert used == again == [({"worker": SLOT}, 960)]
    assert free == [({"worker": SLOT}, 40)]


@brings("TinsmithDiskSlow")
def test_a_commit_that_takes_long(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule tells 0.25 s from more, so there is a bucket that ends there."""

    def at_most(bound: str) -> float:
        return next(value for labels, value in scene.of("TinsmithDiskSlow")[0] if labels["le"] == bound)

    scene.house.store.tenants.create("bob")
    before = at_most("0.25"), at_most("0.5")
    moments = iter((10.0, 10.3))
    clock = SimpleNamespace(perf_counter=lambda: next(moments), monotonic=time.monotonic)
    with monkeypatch.context() as slow:
        slow.setattr(database, "time", clock)
        scene.house.store.tenants.create("carol")
    assert (at_most("0.25"), at_most("0.5")) == (before[0], before[1] + 1)


@brings("TinsmithDiskFillsUp", "TinsmithDiskFull")
def test_a_disk_that_fills_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for left in (10**12, 10**9):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, left=left: SimpleNamespace(free=left))
        assert scene.of("TinsmithDiskFillsUp") == scene.of("TinsmithDiskFull") == [[({}, left)]]


def test_every_alert_is_brought_about() -> None:
    assert BROUGHT | ELSEWHERE.keys() == RULES.keys()
