"""How much of the loop's time does the engine compute, where more is queued: recorded by the loop itself, or beside it?

Workers in this process over real stores, their requests queued ahead: several runs of one tenant, a pass and an
optimizer step each. The arms are two workers that take turns; what isn't computing is looking, claiming, decoding,
recording and waiting for the disk.

    python benchmarks/overlap.py [--runs 8] [--tokens 48] [--steps 4] [--repeats 5]
"""

from __future__ import annotations

import os

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import house
import rows

from tinsmith.types import RunId

ARMS = ("by the loop", "beside it")


class Steps:
    """Runs of one worker, and how far they are."""

    def __init__(self, root: Path, stack: ExitStack, args: argparse.Namespace, *, beside: bool) -> None:
        self._house = house.House(root, stack, threads=args.threads)
        self._tokens = args.tokens
        self._runs: list[RunId] = [self._house.create_run(index, 8) for index in range(args.runs)]
        self._seq = 0
        if beside:
            self._house.worker._recorder.start(lambda: None)
            stack.callback(self._house.worker._recorder.stop)
        self._house.work()
        self.work(2)

    def work(self, steps: int) -> tuple[float, float]:
        """(seconds, those that the engine computed) until all is recorded."""
        asked = set()
        for _ in range(steps):
            for run in self._runs:
                asked.add(self._house.forward_backward(run, self._seq + 1, self._tokens))
                asked.add(self._house.optim_step(run, self._seq + 2))
            self._seq += 2
        worker = self._house.worker
        busy, started = worker._busy_clock.seconds, time.perf_counter()
        self._house.work(asked)
        worker._recorder.flush()
        seconds = time.perf_counter() - started
        return seconds, worker._busy_clock.seconds - busy


def main() -> None:
    args = parse_args()
    print(rows.HEAD)
    rest, share = defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        arms = {arm: Steps(Path(root, arm[:2]), stack, args, beside=arm == ARMS[1]) for arm in ARMS}
        for _ in range(args.repeats):
            for arm in ARMS:
                seconds, busy = arms[arm].work(args.steps)
                rest[arm].append(1e3 * (seconds - busy) / args.steps)
                share[arm].append(100 * busy / seconds)
    found = []
    for arm in ARMS:
        what = f"{args.runs} runs of {args.tokens} tokens, queued ahead, recorded {arm}"
        found.append(rows.Row(f"{what}: engine busy", statistics.median(share[arm]), "%", "", args.repeats))
        found.append(rows.Row(f"{what}: the rest of a step", statistics.median(rest[arm]), "ms", "", args.repeats))
    for row in found:
        print(row, flush=True)
    rows.save(args.rows, found)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    rows.add_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
