"""How soon does a cold sampler answer among 10,000, and how soon can new weights be sampled?

    python benchmarks/many_samplers.py

10,000 samplers of one base, each with a file of its own (hard links of 64 files that a run's saves wrote: what is
looked up, opened, read and checked is the same). Cold: nothing of the sampler is in the worker's memory, and its file
was not read before by this process; one token is asked for, so that the weights' way is what is timed. Published: an
optimizer step is taken, the weights are saved without a name, and one token is sampled from them. All through the
worker, store (synchronous=FULL) and files; medians and 95th percentiles of wall time.
"""

from __future__ import annotations

import argparse
import os
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

from tinsmith.store.rows import NewSampler
from tinsmith.types import BlobKey, RunId, SamplerId, SessionId

NUM_FILES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--large-rank", type=int, default=232, help="of the run that is published: 20 MB of weights")
    parser.add_argument("--directory", default=None)
    rows.add_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory, ExitStack() as stack:
        house = House(Path(directory) / "house", stack, threads=1)
        samplers = make_samplers(house, args)
        house.worker.close()
        house.start_worker()
        figures = {f"cold sampler among {args.samplers}": cold(house, samplers, args)}
        for rank in (args.rank, args.large_rank):
            run = house.create_run(1000 + rank, rank)
            size = house.engine.run_bytes(house.store.runs.get(house.tenant, run).spec) / 4e6
            saved, usable = published(house, run, args, first=10**6 + 10**4 * rank)
            figures[f"sampler of {size:.1f} MB without a name: request to answer"] = saved
            figures[f"sampler of {size:.1f} MB without a name: request to its first token"] = usable
        house.worker.close()
    print(f"| {BASE.name}, 1 thread | median ms | 95 % ms | repeats |\n|---|---|---|---|")
    table = []
    for what, seconds in figures.items():
        ms = np.array(seconds) * 1e3
        print(f"| {what} | {np.median(ms):.1f} | {np.percentile(ms, 95):.1f} | {len(ms)} |")
        target = "< 500" if "cold" in what else "< 50" if "to answer" in what else ""
        table.append(rows.Row(what, float(np.median(ms)), "ms", target, len(ms)))
    rows.save(args.rows, table)


def make_samplers(house: House, args: argparse.Namespace) -> list[SamplerId]:
    """Samplers with rows and files as their saves leave them."""
    run = house.create_run(0, args.rank)
    first = []
    for number in range(NUM_FILES):
        house.optim_step(run, 2 * number + 1)
        first.append(house.save_sampler(run, 2 * number + 2, number)[0])
        house.work()
    kept = [house.store.samplers.get_any(sampler).blob for sampler in first]
    samplers = list(first)
    for number in range(NUM_FILES, args.samplers):
        blob = kept[number % NUM_FILES]
        assert blob is not None
        directory, _, name = blob.rpartition("/")
        link = BlobKey(f"{directory}/{number:032x}.{name.partition('.')[2]}")
        os.link(house.root / "blobs" / blob, house.root / "blobs" / link)
        sampler = SamplerId(f"{house.session}:sample:{number}")
        new = NewSampler(house.tenant, SessionId(house.session), sampler, BASE.name, run_id=run, blob=link)
        house.client.samplers.create(new, time.time())
        samplers.append(sampler)
    return samplers


def cold(house: House, samplers: list[SamplerId], args: argparse.Namespace) -> list[float]:
    chosen = np.random.default_rng(1).choice(len(samplers), args.repeats + 1, replace=False)
    seconds = []
    for index in chosen:
        started = time.perf_counter()
        op = house.sample(samplers[index], 10**6)
        house.work([op])
        seconds.append(house.answered[op] - started)
    return seconds[1:]


def published(house: House, run: RunId, args: argparse.Namespace, first: int) -> tuple[list[float], list[float]]:
    """(request of the save to its answer, the same to a token sampled from it)."""
    house.work()
    saved, usable = [], []
    for number in range(args.repeats + 1):
        step = house.optim_step(run, 2 * number + 1)
        house.work([step])
        house.work()
        started = time.perf_counter()
        sampler, op = house.save_sampler(run, 2 * number + 2, first + number)
        house.work([op])
        saved.append(house.answered[op] - started)
        token = house.sample(sampler, 1)
        house.work([token])
        usable.append(house.answered[token] - started)
    return saved[1:], usable[1:]


if __name__ == "__main__":
    main()
