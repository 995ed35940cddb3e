"""Do distant clients keep the engine busy? Eight naive ones, each of which awaits every call, behind 100 ms of network.

A proxy adds 50 ms in each direction. A naive step is two calls of two round trips, so one client leaves the engine idle
for 400 ms of it; the data are as long as makes a step compute for about 53 ms, so that eight clients just can fill it.
How long the engine computed is what the worker itself counts.

    python benchmarks/latency.py [--clients 8] [--seconds 4] [--repeats 5]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import random_qwen3
import rows
import tinker
from served import serving
from tinker import types

from tinsmith.config import point_sdk_at
from tinsmith.store import Store, open_store

EACH_WAY_S = 0.05
STEP_S = 0.053  # of computing
NUM_DATA = 4
TRIAL_TOKENS = 64
SETTLE_S = 1.0


def main() -> None:
    args = parse_args()
    print(rows.HEAD)
    with tempfile.TemporaryDirectory() as root:
        data_dir = Path(root, "data")
        base_model = random_qwen3.make(Path(root, "model"))
        flags = ("--base-model", base_model, "--threads", str(args.threads), "--lease-s", "0.6")
        with serving(data_dir, *flags) as server, contextlib.closing(open_store(data_dir)) as store:
            num_tokens = length_of(store, stepper(server.url, server.key, TRIAL_TOKENS))
            with behind(server.url) as distant_url:
                steps = [stepper(distant_url, server.key, num_tokens) for _ in range(args.clients)]
                found = measure(store, steps, args)
        for row in found:
            print(row, flush=True)
        rows.save(args.rows, found)


def measure(store: Store, steps: list[Callable[[], None]], args: argparse.Namespace) -> list[rows.Row]:
    alone, together, busy = [], [], []
    for _ in range(args.repeats):
        alone.append(at_work(store, steps[:1], args.seconds)[0])
        rate, share = at_work(store, steps, args.seconds)
        together.append(rate)
        busy.append(share)
    ratio = statistics.median(together) / statistics.median(alone)
    what = f"{args.clients} naive clients behind 100 ms"
    return [
        rows.Row("one naive client behind 100 ms", statistics.median(alone), "steps/s", "", args.repeats),
        rows.Row(what, statistics.median(together), "steps/s", "", args.repeats),
        rows.Row(f"{what} / one", ratio, "x", ">= 6", args.repeats),
        rows.Row(f"{what}: engine busy", 100 * statistics.median(busy), "%", ">= 90", args.repeats),
    ]


def at_work(store: Store, steps: list[Callable[[], None]], seconds: float) -> tuple[float, float]:
    """(steps a second of all clients, share of the time that the engine computed), once all are at work."""
    ended = threading.Event()
    ends: list[float] = []

    def work(index: int) -> None:
        while not ended.is_set():
            steps[index]()
            ends.append(time.perf_counter())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(steps))]
    for thread in threads:
        thread.start()
    time.sleep(SETTLE_S)
    before, busy_before = len(ends), measured(store)
    time.sleep(seconds)
    within = ends[before:]
    rate = (len(within) - 1) / (within[-1] - within[0])
    busy_after = measured(store)
    ended.set()
    for thread in threads:
        thread.join()
    return rate, (busy_after[0] - busy_before[0]) / (busy_after[1] - busy_before[1])


def measured(store: Store) -> tuple[float, float]:
    """(seconds of computing, at which moment) as the worker told last."""
    (worker,) = store.workers.list()
    return worker.busy_s, worker.measured_at or 0.0


def length_of(store: Store, step: Callable[[], None], count: int = 12) -> int:
    """Tokens of a datum with which a step computes for `STEP_S`."""
    for _ in range(3):
        step()
    time.sleep(SETTLE_S)
    before = measured(store)[0]
    for _ in range(count):
        step()
    time.sleep(SETTLE_S)
    seconds = (measured(store)[0] - before) / count
    return max(8, int(TRIAL_TOKENS * STEP_S / seconds))


@contextlib.contextmanager
def behind(url: str) -> Iterator[str]:
    """The URL of a proxy with the delay."""
    address = urlsplit(url)
    script = Path(__file__).parent / "delay_proxy.py"
    command = [sys.executable, str(script), str(address.hostname), str(address.port), str(EACH_WAY_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            if child.stdout is None:
                raise SystemExit("the proxy has no output")
            yield f"http://127.0.0.1:{child.stdout.readline().strip()}"
        finally:
            child.terminate()


def stepper(url: str, key: str, num_tokens: int) -> Callable[[], None]:
    """One naive step of a new run of a new client."""
    point_sdk_at(url, key)
    made = tinker.ServiceClient().create_lora_training_client(random_qwen3.BASE, rank=random_qwen3.RANK)
    run: Any = made.result() if hasattr(made, "result") else made  # a future of the client since SDK 0.38
    data = random_qwen3.sdk_data(types, NUM_DATA, num_tokens)

    def step() -> None:
        run.forward_backward(data, "cross_entropy").result()
        run.optim_step(types.AdamParams(learning_rate=random_qwen3.LEARNING_RATE)).result()

    return step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    rows.add_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
