"""What does the service add to the computing? Start, memory, new runs and round trips of a real server.

Starts `tinsmith serve` of the shipped model on a free port and drives it through the SDK. The computing itself is the
same request on the same engine in this process, between two round trips. Wall times, medians; the CPU time of server
and client beside them, since wall time on a busy machine says little.

    python benchmarks/service.py [--starts 5] [--creates 8] [--steps 40] [--tokens 64] [--synchronous FULL]
"""

from __future__ import annotations

import os

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rows
import tinker
from served import Server, serving
from tinker import types

from tinsmith.bases.catalog import describe, parse
from tinsmith.config import Settings, point_sdk_at
from tinsmith.torch_engine import TorchEngine
from tinsmith.training.budget import USEFUL_TOKENS
from tinsmith.types import AdamParams, Datum, LossSpec, OpId, OptimItem, RunId, RunSpec, TrainItem

BASE = "tinsmith/tiny"
RANK = 32
LEARNING_RATE = 1e-4
SETTLE_S = 2.0  # after the start, before memory is looked at
GEMM = """
import statistics, time, torch
x, w = torch.randn(32, 512), torch.randn(1536, 512)
times, end = [], time.monotonic() + 3
while time.monotonic() < end:
    started = time.perf_counter()
    torch.nn.functional.linear(x, w)
    times.append(time.perf_counter() - started)
print(statistics.median(times[20:]) * 1e3)
"""


class Engine:
    """The same steps without a service."""

    def __init__(self, tokens: np.ndarray[Any, Any]) -> None:
        self._engine = TorchEngine(describe(parse(BASE)), Settings())
        self._run = RunId("bench:train:0")
        self._engine.create_run(RunSpec(self._run, BASE, RANK))
        datum = Datum(
            tokens[:-1].astype(np.int32),
            {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)},
        )
        self._item = TrainItem(OpId("a"), self._run, 1, (datum,), LossSpec("cross_entropy"), backward=True)

    def step(self) -> None:
        training_pass = self._engine.start_pass([self._item])
        while training_pass.advance(USEFUL_TOKENS["cpu"]):
            pass
        training_pass.commit()
        self._engine.optim_step([OptimItem(OpId("b"), self._run, AdamParams(LEARNING_RATE))])


def main() -> None:
    args = parse_args()
    print("| what | median | best | worst | repeats |")
    print("|---|---|---|---|---|")
    table = Table(args.rows)
    with tempfile.TemporaryDirectory() as root:
        starts: list[float] = []
        memory: dict[str, list[float]] = {"Pss": [], "Rss": []}

        def look(server: Server) -> None:
            time.sleep(SETTLE_S)
            starts.append(server.seconds)
            for kind, found in memory.items():
                found.append(server.memory_mib(kind) / 1024)

        for index in range(args.starts - 1):
            with serving(Path(root, f"start{index}"), "--sqlite-synchronous", args.synchronous) as server:
                look(server)
        with serving(Path(root, "data"), "--sqlite-synchronous", args.synchronous) as server:
            look(server)
            table.add("ready after the start", starts, "s", "< 10")
            table.add("idle memory of all processes, PSS", memory["Pss"], "GiB", "< 0.7")
            table.add("idle memory of all processes, RSS", memory["Rss"], "GiB", "< 0.7")
            point_sdk_at(server.url, server.key)
            drive(server, args, table)
            table.add("one fsync on the disk of the data directory", fsync_ms(Path(root)), "ms", "")
    alone, beside = gemm_ms(1), gemm_ms(2)
    table.add("32 x 512 x 1536 product in one process", alone, "ms", "")
    table.add("the same in two processes at once", beside, "ms", "")
    table.add("two at once / one", [max(beside) / alone[0]], "x", "< 4")


class Table:
    """Prints figures and keeps their medians."""

    def __init__(self, rows_file: Path | None) -> None:
        self._rows_file = rows_file

    def add(self, what: str, values: list[float], unit: str, target: str) -> None:
        median = statistics.median(values)
        print(f"| {what} | {median:.3g} {unit} | {min(values):.3g} | {max(values):.3g} | {len(values)} |", flush=True)
        rows.save(self._rows_file, [rows.Row(what, median, unit, target, len(values))])


def drive(server: Server, args: argparse.Namespace, table: Table) -> None:
    client = tinker.ServiceClient()
    tokens = np.random.default_rng(0).integers(0, 256, args.tokens + 1)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": np.ones(args.tokens, np.float32)},
        )
    ]

    def step(run: Any) -> None:
        passed = run.forward_backward(data, "cross_entropy")
        stepped = run.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
        passed.result()
        stepped.result()

    run = create(client)
    step(run)
    creates, firsts = [], []
    for _ in range(args.creates):
        started = time.perf_counter()
        run = create(client)
        created = time.perf_counter()
        step(run)
        creates.append(created - started)
        firsts.append(time.perf_counter() - created)
    table.add("create a run on a warm server", creates, "s", "< 0.2")
    table.add("first step of a run", firsts, "s", "< 0.3")

    engine = Engine(tokens)
    engine.step()
    trips, computes, server_ms, client_ms, compute_ms = [], [], [], [], []
    for _ in range(args.steps):
        server_before, client_before, started = server.cpu_s(), time.process_time(), time.perf_counter()
        step(run)
        trips.append((time.perf_counter() - started) * 1e3)
        client_ms.append((time.process_time() - client_before) * 1e3)
        server_ms.append((server.cpu_s() - server_before) * 1e3)
        client_before, started = time.process_time(), time.perf_counter()
        engine.step()
        computes.append((time.perf_counter() - started) * 1e3)
        compute_ms.append((time.process_time() - client_before) * 1e3)
    added = [trip - compute for trip, compute in zip(trips, computes, strict=True)]
    table.add(f"forward_backward + optim_step of {args.tokens} tokens, {args.synchronous}", trips, "ms", "")
    table.add("the computing alone", computes, "ms", "")
    table.add("what service and SDK add to it", added, "ms", "< 20")
    table.add("CPU time of a round trip, all server processes", server_ms, "ms", "")
    table.add("CPU time of a round trip, the client", client_ms, "ms", "")
    table.add("CPU time of the computing alone", compute_ms, "ms", "")


def fsync_ms(directory: Path) -> list[float]:
    """An append of a page and its fsync, a hundred times."""
    times = []
    with (directory / "fsync").open("ab", buffering=0) as out:
        for _ in range(100):
            out.write(bytes(4096))
            started = time.perf_counter()
            os.fsync(out.fileno())
            times.append((time.perf_counter() - started) * 1e3)
    return times


def create(client: Any) -> Any:
    made = client.create_lora_training_client(BASE, rank=RANK)
    return made.result() if hasattr(made, "result") else made  # a future of the client since SDK 0.38


def gemm_ms(count: int) -> list[float]:
    """The median time of a small product in each of `count` processes, with the environment that `serve` gives."""
    env = dict(os.environ)
    children = [subprocess.Popen([sys.executable, "-c", GEMM], env=env, stdout=subprocess.PIPE) for _ in range(count)]
    return [float(child.communicate()[0]) for child in children]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--creates", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--synchronous", default="FULL", help="SQLite's synchronous pragma")
    rows.add_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
