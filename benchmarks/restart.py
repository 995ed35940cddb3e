"""How long after a crash is a worker ready, with 100 runs of 10 requests each to compute again?

    python benchmarks/restart.py

Each run of the shipped model has a snapshot and 10 requests above it, recorded, when the worker dies: five passes and
five optimizer steps. A new process loads the model and takes the runs; then a client of one of them sends a request
(the others come back when they are needed), and at last clients of all. All times are from the start of the process.
The weights have to be those of before, within 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import numpy as np
import rows
from house import House

from tinsmith.types import FloatArray, RunId

LENGTH = 32
STEPS = 5
READY_S = "< 15"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", default=None)
    parser.add_argument("--again", default=None, help=argparse.SUPPRESS)
    rows.add_flag(parser)
    args = parser.parse_args()
    if args.again is not None:
        print(json.dumps(again(Path(args.again), args)))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        lived = Path(directory) / "lived"
        live(lived, args)
        found = [restarted(lived, Path(directory) / str(number), args) for number in range(args.repeats)]
    median = {key: statistics.median(one[key] for one in found) for key in found[0]}
    made = [
        rows.Row(
            f"Restart to the first answer, {args.runs} runs to replay", median["first"], "s", READY_S, args.repeats
        ),
        rows.Row("to the answers of all", median["all"], "s", READY_S, args.repeats),
        rows.Row("to a loaded model", median["ready"], "s", "", args.repeats),
        rows.Row("runs computed again for the first answer", median["restored"], "", "< 2", args.repeats),
    ]
    print(f"\n{rows.HEAD}")
    for row in made:
        print(row)
    rows.save(args.rows, made)


def live(root: Path, args: argparse.Namespace) -> None:
    """Runs with a snapshot of their creation and a log above it, in a directory whose worker dies."""
    with ExitStack() as stack:
        house = House(root, stack, threads=1, max_resident_runs=args.runs, snapshot_debt_s=1e9)
        runs = [house.create_run(number, args.rank) for number in range(args.runs)]
        for run in runs:
            house.optim_step(run, 1)
        house.work()
        house.worker.close()
        house.start_worker()
        for run in runs:
            for step in range(STEPS):
                house.forward_backward(run, 2 + 2 * step, LENGTH)
                house.optim_step(run, 3 + 2 * step)
        house.work()
        np.save(root / "weights.npy", np.stack([weights(house, run) for run in runs]))
        (root / "who.json").write_text(json.dumps([house.tenant, house.session]))


def restarted(lived: Path, root: Path, args: argparse.Namespace) -> dict[str, float]:
    """Times of a new process on a copy of the directory."""
    subprocess.run(["cp", "-r", str(lived), str(root)], check=True)
    command = [sys.executable, __file__, "--again", str(root), "--runs", str(args.runs), "--rank", str(args.rank)]
    started = time.time()
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    times: dict[str, float] = json.loads(out.splitlines()[-1])
    return {key: value - started if value > 1e9 else value for key, value in times.items()}


def again(root: Path, args: argparse.Namespace) -> dict[str, float]:
    """In the new process: unix times at which it was ready, had answered one run, and all; how many were restored."""
    with ExitStack() as stack:
        house = Returned(root, stack, threads=1, max_resident_runs=args.runs)
        ready = time.time()
        runs = [RunId(f"{house.session}:train:{number}") for number in range(args.runs)]
        seq = 2 + 2 * STEPS
        house.work([house.forward_backward(runs[args.runs // 2], seq, LENGTH)])
        first, restored = time.time(), sum(house.engine.has_run(run) for run in runs)
        house.work([house.forward_backward(run, seq, LENGTH) for run in runs if not house.engine.has_run(run)])
        done = time.time()
        off = np.abs(np.stack([weights(house, run) for run in runs]) - np.load(root / "weights.npy")).max()
        if off > 1e-5:
            raise SystemExit(f"weights are off by {off}")
        return {"ready": ready, "first": first, "all": done, "restored": restored}


def weights(house: House, run: RunId) -> FloatArray:
    return np.concatenate([tensor.ravel() for tensor in house.engine.export_run(run, ("param",)).tensors.values()])


class Returned(House):
    """The house of a directory in which others lived before."""

    def sign_up(self) -> None:
        self.tenant, self.session = json.loads((self.root / "who.json").read_text())


if __name__ == "__main__":
    main()
