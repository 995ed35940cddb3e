"""Two workers of a base over the fake engine, in processes that may die (lives.py): one gives runs, one takes them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import structlog

from tests.crash import lives
from tests.flow.house import train
from tinsmith import crashpoints
from tinsmith.fake_engine import FakePass
from tinsmith.store import runs
from tinsmith.worker import rebalancing
from tinsmith.worker.loop import Worker

A, B = "0", "0-2"
NUM_RUNS = 6  # of which half go
ROOMY = {"inline_bytes": 16, "session_timeout_s": 1e6, "workers_per_base": 2, "pass_max_tokens": 3}
SETTINGS = lives.SETTINGS | ROOMY | {"max_resident_runs": 4, "lease_s": 300.0}  # nobody renews


def be_quick(check_s: float = 0.0, stay_s: float = 0.0) -> None:
    """Runs are given away as soon as they may be."""
    structlog.configure(processors=[lives._drop])
    rebalancing.CHECK_S, rebalancing.STAY_S = check_s, stay_s
    runs.PATIENCE_S = 0.05


def come(home: lives.Home, slot: str) -> Worker:
    worker = home.worker(slot)
    home.store.workers.set_ready(worker._me)
    return worker


def ask(home: lives.Home, steps: range) -> None:
    """All that the client asks for up to these steps; what was asked for before answers as a duplicate."""
    for number, run in enumerate(lives.runs_of(home, NUM_RUNS)):
        home._num_runs = number
        home.create_run(seed=number)
        train(home, run, range(steps.stop))


def turn(worker: Worker) -> bool:
    worker._heard_at, worker._must_look = float("-inf"), True
    worker._queue.distrust()
    return worker.step()


def num_at(home: lives.Home, slot: str | None) -> int:
    rows = [home.store.runs.get(home.tenant, run) for run in lives.runs_of(home, NUM_RUNS)]
    return sum(row.lease_owner == slot for row in rows)


def give(root: Path, crash_point: str) -> None:
    """One worker has all runs, another comes; the first one works until half of the runs are free, and dies then."""
    be_quick()
    with contextlib.closing(lives.Home(root, **ROOMY)) as home:
        ask(home, range(1))
        first = come(home, A)
        lives.settle(first)
        assert num_at(home, A) == NUM_RUNS
        come(home, B)
        ask(home, range(3))
        crashpoints.arm_from(crash_point)
        until_ = time.monotonic() + 120
        while num_at(home, None) < NUM_RUNS // 2:
            assert time.monotonic() < until_, "no run was given away"
            turn(first)
            if first._writer.num_pending:
                time.sleep(0.005)
        os._exit(0)


def take(root: Path, crash_point: str) -> None:
    """The other one takes what is free."""
    be_quick()
    with contextlib.closing(lives.Home(root, **SETTINGS)) as home:
        second = come(home, B)
        crashpoints.arm_from(crash_point)
        lives.settle(second)
        os._exit(0)


def finish(root: Path) -> None:
    """Both are started again, do what is left, and end."""
    be_quick()
    with contextlib.closing(lives.Home(root, **SETTINGS)) as home:
        both = [come(home, slot) for slot in (A, B)]
        ask(home, range(4))
        until_ = time.monotonic() + 120
        while home.store.overview.figures().waiting:
            assert time.monotonic() < until_, "requests wait for ever"
            for worker in both:
                lives.settle(worker)
            time.sleep(0.02)
        lives.see(home)
        for worker in both:
            worker.close()
            home.store.workers.deregister(worker._me)


def work(root: Path, slot: str, crash_point: str) -> None:
    """A worker as it is in a server, but for the time that a run stays; a pack takes 5 ms."""
    be_quick(0.05, 0.2)
    advance = FakePass.advance

    def slow(self: FakePass, max_work: int) -> Any:
        time.sleep(0.005)
        return advance(self, max_work)

    FakePass.advance = slow  # type: ignore[method-assign]
    with contextlib.closing(lives.Home(root, **SETTINGS)) as home:
        worker, stop = come(home, slot), threading.Event()
        crashpoints.arm_from(crash_point)
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        worker.run(stop)
        home.store.workers.deregister(worker._me)
