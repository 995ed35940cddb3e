"""What it costs to count: processor time of all that is counted for one request, beside that of the request itself.

Arms take turns in one process: counting into files as a server's processes do, and not counting. Each pass of an arm
carries the same requests through a worker over the fake engine (pass and step of runs of several tenants), which
computes nothing, so that what is left is the service's own work. Then the counters alone, and one scrape.

    PYTHONPATH=src:. python benchmarks/watching.py [--rows FILE]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rows
import structlog
from msgspec.structs import replace

from tests.flow.house import House, settle, train
from tinsmith.api.figures import Watched
from tinsmith.api.marks import log_request
from tinsmith.config import METRICS_DIR, Settings
from tinsmith.ipc.heartbeat import Ear
from tinsmith.observe import series
from tinsmith.observe.metrics import Counting
from tinsmith.store.usage_rows import Usage
from tinsmith.wire.media import JSON
from tinsmith.worker.outcomes import computed
from tinsmith.worker.watch import Watch

NUM_RUNS = 16
STEPS = 8
ROUNDS = 11
CALLS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows.add_flag(parser)
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory() as root:
        shared = Path(root) / "metrics"
        shared.mkdir()
        os.environ[METRICS_DIR] = str(shared)
        counting = Counting(series.TABLE, "worker-0", shared)
        costs: dict[bool, list[float]] = {True: [], False: []}
        house = House(Path(root) / "data", sqlite_synchronous="NORMAL")
        try:
            for number in range(2 * ROUNDS + 2):
                is_counting = number % 2 == 0
                counting.start() if is_counting else counting.stop()
                cost = _ops(house)
                if number >= 2:
                    costs[is_counting].append(cost)
            counting.start()
            http_us = _answer_us()
            outcome_us = _outcome_us(house)
            counting.stop()
            http_us -= _answer_us()
            outcome_us -= _outcome_us(house)
            counting.start()
            watched = Watched(house.store, house.settings, counting, lambda: 0, dict, Ear(None, 60.0))
            scrape_us = statistics.median(_cpu(watched._counting.text, watched._reader) for _ in range(9)) * 1e6
            num_bytes = len(watched.text())
        finally:
            counting.stop()
            house.close()
    with_us, without_us = (statistics.median(costs[arm]) * 1e6 for arm in (True, False))
    table = [
        rows.Row("counting, worker: one request", with_us - without_us, "us of CPU", "", ROUNDS),
        rows.Row("the same, of the request's own", (with_us / without_us - 1) * 100, "%", "< 5", ROUNDS),
        rows.Row("counting alone, worker: one outcome", outcome_us, "us of CPU", "< 10", 1),
        rows.Row("counting, API: one answer", http_us, "us of CPU", "", 1),
        rows.Row("a scrape of /metrics", scrape_us / 1e3, "ms of CPU", "", 9),
    ]
    print(f"a request costs the worker {without_us:.0f} us without counting; a scrape has {num_bytes / 1024:.0f} KiB")
    print("\n".join([rows.HEAD, *map(str, table)]))
    rows.save(args.rows, table)


def _ops(house: House) -> float:
    """Seconds of processor time of the worker for one op."""
    house.be(f"tenant-{time.monotonic_ns()}")
    worker = house.worker()
    runs = [house.create_run(seed=number) for number in range(NUM_RUNS)]
    settle(worker)
    ops = [op for run in runs for op in train(house, run, range(STEPS))]
    started = time.process_time()
    settle(worker)
    spent = time.process_time() - started
    worker.close()
    return spent / len(ops)


def _outcome_us(house: House) -> float:
    """What a worker does about one recorded outcome."""
    row = house.forward_backward(house.create_run(), 1, [1, 2, 3])
    usage = Usage(trained_tokens=3)
    outcome = computed(replace(row, started_at=row.created_at), bytes, 0, JSON, usage)
    watch = Watch("0", house.store, house.engine, Settings())
    return _per_call(lambda: watch.recorded([outcome]))


def _answer_us() -> float:
    return _per_call(lambda: log_request("POST", "/api/v1/x", 200, 0.001, None, "/api/v1/x", None))


def _per_call(call: Callable[[], object]) -> float:
    """Microseconds of processor time."""

    def loop() -> None:
        for _ in range(CALLS):
            call()

    return _cpu(loop) / CALLS * 1e6


def _cpu(call: Callable[..., object], *args: object) -> float:
    started = time.process_time()
    call(*args)
    return time.process_time() - started


if __name__ == "__main__":
    main()
