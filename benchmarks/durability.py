"""What do the log and the snapshots cost?

    python benchmarks/durability.py

Runs are trained in two ways, turn about, by the same engine in this process. In one a worker takes their requests from
a store (synchronous=FULL) and files, records every outcome, and snapshots each run after `--debt` seconds of its
computing (by default forty times as often as the service). In the other the engine is called with the decoded requests
and nothing is kept: no store, no files, no wire format. Throughput is tokens of a forward_backward per second; each
request is followed by an optim_step.

Then, with a run of rank 32: how long the worker's loop is held to begin a snapshot, beyond the copying of the run's
rows, and how much longer a pass is while the state is written beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import numpy as np
import rows
import torch
from house import BASE, House

from tinsmith.config import Settings
from tinsmith.types import AdamParams, Datum, LossSpec, OpId, OptimItem, RunId, RunSpec, TokenArray, TrainItem

ADAM = AdamParams(learning_rate=1e-4)
HELD_MS = "< 5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a request")
    parser.add_argument("--steps", type=int, default=2, help="of each run in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--debt", type=float, default=Settings.load({}).snapshot_debt_s / 40)
    parser.add_argument("--directory", default=None)
    rows.add_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory, ExitStack() as stack:
        house = House(Path(directory) / "data", stack, threads=1, snapshot_debt_s=args.debt)
        house.worker._recorder.start(house._wake.ring)
        stack.callback(house.worker._recorder.stop)
        made = throughput(house, args)
        made += held(house)
        house.worker.close()
    print(f"\n{rows.HEAD}")
    for row in made:
        print(row)
    rows.save(args.rows, made)


def throughput(house: House, args: argparse.Namespace) -> list[rows.Row]:
    logged, bare = Logged(house, args), Bare(house, args)
    tokens = args.runs * args.length * args.steps
    rates: dict[str, list[float]] = {"logged": [], "bare": []}
    cpu: dict[str, list[float]] = {"logged": [], "bare": []}
    snapshots = 0
    for number in range(args.rounds + 1):
        for name, play in (("logged", logged.play), ("bare", bare.play)):
            before, started = time.process_time(), time.perf_counter()
            play()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - before
            if number:  # the first is to warm up
                rates[name].append(tokens / seconds)
                cpu[name].append(tokens / cpu_seconds)
        snapshots = sum(house.store.runs.get(house.tenant, run).snapshot_seq > 0 for run in logged.runs)
    print(f"{tokens} tokens a round, {args.runs} runs of rank {args.rank}, {snapshots} of them snapshotted meanwhile")
    ratio = statistics.median(a / b for a, b in zip(rates["logged"], rates["bare"], strict=True))
    cpu_ratio = statistics.median(a / b for a, b in zip(cpu["logged"], cpu["bare"], strict=True))
    return [
        rows.Row("Training with the log and snapshots / with neither", ratio, "x", ">= 0.95", args.rounds),
        rows.Row("the same, by processor time", cpu_ratio, "x", "", args.rounds),
        rows.Row("with the log and snapshots", statistics.median(rates["logged"]), "tokens/s", "", args.rounds),
    ]


class Logged:
    """Requests through the store and the worker."""

    def __init__(self, house: House, args: argparse.Namespace) -> None:
        self._house, self._args = house, args
        self.runs = [house.create_run(number, args.rank) for number in range(args.runs)]
        house.work()
        self._seq = 1
        self._ready: list[OpId] = []
        self._enqueue()

    def _enqueue(self) -> None:
        """What clients send ahead; that isn't timed, since it isn't the worker's time."""
        self._ready = []
        for run in self.runs:
            for step in range(self._args.steps):
                self._house.forward_backward(run, self._seq + 2 * step, self._args.length)
                self._ready.append(self._house.optim_step(run, self._seq + 2 * step + 1))
        self._seq += 2 * self._args.steps

    def play(self) -> None:
        house = self._house
        house.work(self._ready)
        house.worker._recorder.flush()
        house.answered.clear()
        self._enqueue()


class Bare:
    """The same through the engine alone."""

    def __init__(self, house: House, args: argparse.Namespace) -> None:
        self._engine, self._steps = house.engine, args.steps
        self._items: list[TrainItem] = []
        self._optim: list[OptimItem] = []
        for number in range(args.runs):
            run = RunId(f"bare:train:{number}")
            self._engine.create_run(RunSpec(run, BASE.name, rank=args.rank, seed=number))
            tokens = np.random.default_rng(number).integers(0, BASE.vocab_size, args.length).astype(np.int32)
            self._items.append(train_item(run, tokens))
            self._optim.append(OptimItem(OpId(f"o{number}"), run, ADAM))

    def play(self) -> None:
        for _ in range(self._steps):
            training = self._engine.start_pass(self._items)
            while not training.is_computed:
                training.advance(self._engine.pass_max_tokens)
            training.commit()
            self._engine.optim_step(self._optim)


def train_item(run: RunId, tokens: TokenArray) -> TrainItem:
    datum = Datum(tokens, {"target_tokens": tokens.astype(np.int64)})
    return TrainItem(OpId("f"), run, 1, (datum,), LossSpec("cross_entropy"), backward=True)


def held(house: House, tries: int = 9) -> list[rows.Row]:
    """How long a snapshot holds the loop."""
    run = house.create_run(1000, 32)
    house.forward_backward(run, 1, 64)
    house.work([house.optim_step(run, 2)])
    house.forward_backward(run, 3, 64)  # with gradients beside the moments
    house.work()
    slot = house.engine._trainer._slots[run]
    snapshots, held_run = house.worker.runs._snapshots, house.worker.runs[run]
    beyond, calm, beside = [], [], []
    for _ in range(tries):
        started = time.perf_counter()
        copies = [row.to("cpu", torch.float32, copy=True) for row in slot.rows.values()]
        copying = time.perf_counter() - started
        del copies
        held_run.debt_ops = held_run.debt_bytes = 1
        started = time.perf_counter()
        snapshots.start(held_run)
        beyond.append(1e3 * max(0.0, time.perf_counter() - started - copying))
        beside.append(passes_ms(house, while_writing=True))
        house.worker._writer.flush()
        calm.append(passes_ms(house, while_writing=False))
    size = house.engine.run_bytes(held_run.row.spec) / 2**20
    longer = statistics.median(beside) - statistics.median(calm)
    return [
        rows.Row(
            f"A snapshot of rank 32 ({size:.0f} MiB) holds the loop", statistics.median(beyond), "ms", HELD_MS, tries
        ),
        rows.Row("a pass is longer while it is written", max(0.0, longer), "ms", HELD_MS, tries),
    ]


def passes_ms(house: House, *, while_writing: bool) -> float:
    """The median time of a short pass, while the snapshot is written or of as many without one."""
    times: list[float] = []
    item = train_item(RunId("bare:train:0"), np.arange(32, dtype=np.int32))
    while len(times) < 5 and (not times or not while_writing or house.worker._writer._done.empty()):
        started = time.perf_counter()
        training = house.engine.start_pass([item])
        while not training.is_computed:
            training.advance(house.engine.pass_max_tokens)
        training.commit()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


if __name__ == "__main__":
    main()
