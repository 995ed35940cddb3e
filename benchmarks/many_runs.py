"""What do 4,096 registered runs cost, of which 64 are at work, with memory for 128?

    python benchmarks/many_runs.py

64 clients each train a run: a forward_backward of one sequence and an optim_step; when both are answered for all, the
next round begins. After each round some clients turn to another run, drawn by Zipf's law (a = 1.1) among all: within
32 rounds, some seconds, as many as are at work; the service is meant for as many in a minute. Whatever is turned to has
taken an optimizer step before, so its state has to come from its file. Two workers, each with a
store (synchronous=FULL) and files of its own, do the same in turns: one holds at most 128 runs in memory, the other all
of them. A step is timed from the moment at which its round's requests are there to that at which both its answers are
recorded.

Steps of a round end together, so the p99 of a few thousand steps is one slow round of forty, whoever slowed it. The two
go first in turns, round by round; the p99 of either is taken in blocks of rounds, and the median of the blocks' ratios
counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import numpy as np
import rows
import torch
from house import House
from numpy.typing import NDArray

from tinsmith.types import RunId

LENGTH = 8
ZIPF = 1.1
WARM_UP = 4
BLOCK = 16  # rounds, in which the slowest is the p99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4096)
    parser.add_argument("--active", type=int, default=64)
    parser.add_argument("--resident", type=int, default=128)
    parser.add_argument("--turn", type=int, default=2, help="clients that turn to another run after each round")
    parser.add_argument("--rounds", type=int, default=5 * BLOCK)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--directory", default=None)
    rows.add_flag(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory, ExitStack() as stack:
        arms: dict[str, Arm] = {}
        for name, limit in (("all resident", args.runs), ("cache", args.resident)):
            started = time.perf_counter()
            arms[name] = Arm(House(Path(directory) / name.split()[0], stack, max_resident_runs=limit, threads=1), args)
            print(f"{name}: {args.runs} runs created in {time.perf_counter() - started:.0f} s", flush=True)
        order = runs_by_round(args)
        num_different = len({run for chosen in order for run in chosen})
        print(f"{num_different} different runs are at work in {len(order)} rounds", flush=True)
        for number, chosen in enumerate(order):
            for arm in list(arms.values())[:: 1 if number % 2 else -1]:
                arm.play(chosen, is_timed=number >= WARM_UP)
        report(arms, args)
        for arm in arms.values():
            arm.house.worker.close()


class Arm:
    """One worker. seqs: the next request of each run; peak: most bytes of runs in its engine."""

    def __init__(self, house: House, args: argparse.Namespace) -> None:
        self.house = house
        self.runs: list[RunId] = []
        for number in range(args.runs):
            self.runs.append(house.create_run(number, args.rank))
            if number % 256 == 255:
                house.work()
        house.work()
        self.seqs = [1] * args.runs
        for number in sorted({number for chosen in runs_by_round(args) for number in chosen}):
            house.optim_step(self.runs[number], 1)
            self.seqs[number] = 2
        house.work()
        self.seconds: list[float] = []
        self.peak = 0
        self.peak_ahead = 0

    def play(self, chosen: list[int], *, is_timed: bool) -> None:
        """A step of each of these runs."""
        house = self.house
        steps = []
        for number in chosen:
            run, seq = self.runs[number], self.seqs[number]
            house.forward_backward(run, seq, LENGTH)
            steps.append(house.optim_step(run, seq + 1))
            self.seqs[number] += 2
        started = time.perf_counter()
        house._wake.ring()
        while not all(step in house.answered for step in steps):
            house.turn()
            self.peak = max(self.peak, house.engine.runs_bytes)
            self.peak_ahead = max(self.peak_ahead, house.worker._ahead.num_bytes)
        if is_timed:
            self.seconds += [house.answered[step] - started for step in steps]
        house.answered.clear()


def runs_by_round(args: argparse.Namespace) -> list[list[int]]:
    """The runs of each round, all different."""
    rng = np.random.default_rng(0)
    weights = np.arange(1, args.runs + 1) ** -ZIPF
    weights /= weights.sum()
    places = rng.permutation(args.runs)
    active = list(rng.choice(args.runs, args.active, replace=False, p=weights))
    rounds = []
    for _ in range(args.rounds + WARM_UP):
        rounds.append([int(places[number]) for number in active])
        for _ in range(args.turn):
            new = int(rng.choice(args.runs, p=weights))
            while new in active:
                new = int(rng.choice(args.runs, p=weights))
            active.pop(0)
            active.append(new)
    return rounds


def report(arms: Mapping[str, Arm], args: argparse.Namespace) -> None:
    print(
        "\n| runs in memory | median ms | p99 ms | p99 of a block | longest ms | MiB of runs, most | bound |\n"
        "|---|---|---|---|---|---|---|"
    )
    p99: dict[str, NDArray[np.float64]] = {}
    for name, arm in arms.items():
        ms = np.array(arm.seconds) * 1e3
        blocks = np.array_split(ms, max(1, len(ms) // (BLOCK * args.active)))
        p99[name] = np.array([np.percentile(block, 99) for block in blocks])
        spec = arm.house.store.runs.get(arm.house.tenant, arm.runs[0]).spec
        size = arm.house.engine.run_bytes(spec)
        limit = arm.house.settings.max_resident_runs
        print(
            f"| {name} ({limit}) | {np.median(ms):.0f} | {np.percentile(ms, 99):.0f} | {np.median(p99[name]):.0f} | "
            f"{ms.max():.0f} | {arm.peak / 2**20:.1f} | {limit * size / 2**20:.1f} |"
        )
        if arm.peak > limit * size:
            raise SystemExit(f"{name}: {arm.peak} bytes of runs in memory, bound {limit * size}")
    ratios = p99["cache"] / p99["all resident"]
    cache = arms["cache"]
    print(f"\np99 of blocks, x: {', '.join(f'{x:.2f}' for x in ratios)}; read ahead {cache.peak_ahead / 2**20:.2f} MiB")
    what = f"{args.runs} runs, Zipf access, {args.active} active, {args.resident} in memory: p99 step / all resident"
    rows.save(args.rows, [rows.Row(what, float(np.median(ratios)), "x", "< 2", len(ratios))])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
