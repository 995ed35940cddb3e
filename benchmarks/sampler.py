"""The sampler against itself: many runs or one, a shared prompt or one each, and what others notice of a long prompt.

* `runs`: 32 sequences of 32 runs against 32 of one run: adapters of rank 16 on the layers alone, and what the SDK's
  clients get without a word, rank 32 with the head.
* `group`: 16 samples of a prompt of 512 tokens against 16 requests that compute it each.
* `long`: the steps of a sequence that is decoded while a prompt of 8,192 tokens comes in, and how long that one waits.
* `deterministic`: what deterministic mode costs 32 sequences of 32 runs, and one alone.
* `memory`: what it costs where memory is scarce: requests that may fill all of it, and end early. Memory is given as
  they grow; what gives way goes on where it was, or in deterministic mode starts again.
* `steps`: what a step costs beside the walk over the base, with 32 to 1,024 sequences.

Random weights in float32, CPU time of the process; arms alternate, and the median of the repeats is shown.

    python benchmarks/sampler.py [--only runs group deterministic long memory steps] [--repeats 5]
"""

from __future__ import annotations

import os

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from logging import WARNING
from pathlib import Path

import numpy as np
import rows
import structlog
import torch
from sample_vs_generate import NoText, make_states, random_base
from transformers.utils import logging

from tinsmith.config import Settings
from tinsmith.model import BaseModel, load_base
from tinsmith.sampling import Sampler
from tinsmith.types import OpId, RunState, SampleItem, SamplingParams, Targets

MIDDLE = "512x8x32000"
SMALL = "256x4x8192"
NEW_TOKENS = 32


def request(index: int, length: int, vocab: int, max_tokens: int | None, adapter: str | None = None) -> SampleItem:
    """Never stops by itself; the prompt is drawn from the index."""
    ids = np.random.default_rng(index).integers(0, vocab, length).astype(np.int32)
    return SampleItem(OpId(f"op{index}"), adapter, ids, SamplingParams(max_tokens=max_tokens, stop_tokens=()), 1, index)


def run(sampler: Sampler, items: Sequence[SampleItem]) -> list[float]:
    """CPU seconds of each step."""
    for item in items:
        sampler.submit(item)
    steps = []
    while sampler.num_samples:
        started = time.process_time()
        sampler.step()
        steps.append(time.process_time() - started)
    return steps


def ratio(repeats: int, one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of both in seconds, and the median of other / one; each once before it counts."""
    one(), other()
    pairs = [(one(), other()) for _ in range(repeats)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def bench_runs(base: BaseModel, args: argparse.Namespace) -> list[rows.Row]:
    return [runs_row(base, args, rank, has_head) for rank, has_head in ((16, False), (32, True))]


def runs_row(base: BaseModel, args: argparse.Namespace, rank: int, has_head: bool) -> rows.Row:
    settings = Settings(compiled_adapters=not args.batched_products)
    sampler = Sampler(base, settings, NoText())
    for state in make_states(base, 32, rank, Targets(unembed=has_head)):
        sampler.add_adapter(state.spec.run_id, state)
    vocab = base.info.vocab_size

    def arm(num_runs: int) -> Callable[[], float]:
        items = [request(i, 32, vocab, NEW_TOKENS, f"run{i % num_runs}") for i in range(32)]
        return lambda: sum(run(sampler, items))

    of_many, of_one, share = ratio(args.repeats, arm(32), arm(1))
    who = f"rank {rank} on the layers{' and the head' if has_head else ''}"
    print(f"32 rows of 32 runs, {who}: {of_many:.2f} s; of one run: {of_one:.2f} s; {share:.2f} of its speed")
    what = f"sampling, 32 runs / 32 rows of one run, {who}, hidden {base.head.in_features}, CPU time"
    return rows.Row(what, share, "", "" if has_head else ">= 0.93", args.repeats)


def bench_group(base: BaseModel, args: argparse.Namespace) -> list[rows.Row]:
    sampler = Sampler(base, Settings(prefix_cache_mib=0), NoText())
    found = []
    for num_tokens, target in ((16, ">= 4"), (64, "")):
        one = request(1, 512, base.info.vocab_size, num_tokens)
        group = [replace(one, num_samples=16)]
        each = [replace(one, op_id=OpId(f"op{i}"), seed=i) for i in range(16)]
        shared, alone, times = ratio(
            args.repeats, lambda g=group: sum(run(sampler, g)), lambda e=each: sum(run(sampler, e))
        )
        print(f"16 x {num_tokens} tokens after 512: {shared:.2f} s; as 16 requests: {alone:.2f} s; {times:.1f} x")
        what = f"group sampling, 16 x {num_tokens} tokens after 512: shared prompt / one each, CPU time"
        found.append(rows.Row(what, times, "x", target, args.repeats))
    return found


def bench_deterministic(base: BaseModel, args: argparse.Namespace) -> list[rows.Row]:
    stable = load_base(base.info, device=torch.device("cpu"), dtype=torch.float32, deterministic=True)
    found = []
    for num, rank, has_head in ((32, 16, False), (32, 32, True), (1, 16, False)):
        states = make_states(base, num, rank, Targets(unembed=has_head))
        items = [request(i, 32, base.info.vocab_size, NEW_TOKENS, f"run{i}") for i in range(num)]

        def arm(
            of: BaseModel, deterministic: bool, states: list[RunState] = states, items: Sequence[SampleItem] = items
        ) -> Callable[[], float]:
            sampler = Sampler(of, Settings(deterministic=deterministic), NoText())
            for state in states:
                sampler.add_adapter(state.spec.run_id, state)
            return lambda: sum(run(sampler, items))

        usual, slower, times = ratio(args.repeats, arm(base, False), arm(stable, True))
        case = f"{num} sequence(s) with {num} adapter(s) of rank {rank}{' with the head' if has_head else ''}"
        print(f"{case}: {usual:.2f} s; deterministic: {slower:.2f} s; {times:.2f} x")
        what = f"sampling, {case}, hidden {base.head.in_features}: deterministic / default, CPU time"
        found.append(rows.Row(what, times, "x", "" if has_head else "< 1.4", args.repeats))
    return found


def bench_long(base: BaseModel, args: argparse.Namespace) -> list[rows.Row]:
    vocab = base.info.vocab_size
    alone, beside, waits = [], [], []
    for repeat in range(args.repeats):
        sampler = Sampler(base, Settings(prefix_cache_mib=0), NoText())
        sampler.submit(request(1000 + repeat, 32, vocab, 400))
        steps = [timed(sampler) for _ in range(40)]
        alone.append(statistics.median(steps[8:]))
        sampler.submit(request(2000 + repeat, 8192, vocab, 2))
        coming = []
        while sampler.num_samples > 1:
            coming.append(timed(sampler))
        beside.append(max(coming))
        waits.append(sum(coming))
    token, worst, wait = map(statistics.median, (alone, beside, waits))
    print(
        f"a token takes {1e3 * token:.1f} ms; while 8,192 tokens of prompt come in, at most {1e3 * worst:.0f} ms, and "
        f"that prompt is answered after {wait:.2f} s, {8192 / wait:.0f} tokens/s"
    )
    what = "longest step of a decoding sequence while a prompt of 8,192 tokens comes in, of that prompt's whole time"
    return [rows.Row(what, worst / wait, "", "", args.repeats)]


def timed(sampler: Sampler) -> float:
    started = time.process_time()
    sampler.step()
    return time.process_time() - started


def bench_memory(base: BaseModel, args: argparse.Namespace) -> list[rows.Row]:
    """24 requests without max_tokens whose sequences end at their 40th token, in 32 blocks of 64."""
    vocab = base.info.vocab_size
    settings = Settings(prefix_cache_mib=0)
    free = [replace(request(i, 40, vocab, 40), op_id=OpId(f"op{i}")) for i in range(24)]
    lasts: dict[str, int] = {}
    sampler = Sampler(base, settings, NoText())
    for item in free:
        sampler.submit(item)
    while sampler.num_samples:
        lasts.update({op: int(result.sequences[0].tokens[-1]) for op, result in sampler.step()})
    items = [
        replace(item, params=SamplingParams(max_tokens=None, stop_tokens=(lasts[item.op_id],)), seed=item.seed)
        for item in free
    ]

    def arm(deterministic: bool) -> Callable[[], float]:
        made = replace(settings, deterministic=deterministic)
        return lambda: sum(run(Sampler(base, made, NoText(), kv_blocks=32), items))

    given, reserved, times = ratio(args.repeats, arm(False), arm(True))
    print(f"24 open-ended requests in 32 blocks: {given:.2f} s; deterministic: {reserved:.2f} s; {times:.1f} x")
    what = "sampling, 24 open-ended requests in memory for 16: deterministic / default, CPU time"
    return [rows.Row(what, times, "x", "< 1.4", args.repeats)]


def bench_steps(base: BaseModel, args: argparse.Namespace) -> list[rows.Row]:
    """Beside the walk: who grows, what is drawn, what ended."""
    costs: dict[int, float] = {}
    for num in (32, 256, 1024):
        sampler = Sampler(base, Settings(max_resident_samples=2 * num, kv_cache_mib=8192), NoText())
        walked = [0.0]
        inner = sampler._walker._run

        def counted(*given: object, inner: Callable[..., torch.Tensor] = inner) -> torch.Tensor:
            started = time.process_time()
            hidden = inner(*given)
            walked[0] += time.process_time() - started  # noqa: B023
            return hidden

        sampler._walker._run = counted  # type: ignore[method-assign]
        for index in range(num):
            sampler.submit(request(index, 1 + index % 31, base.info.vocab_size, 200))
        while len(sampler._stages.running) < num:
            sampler.step()
        rest = []
        for _ in range(40):
            walked[0] = 0.0
            rest.append(timed(sampler) - walked[0])
        costs[num] = statistics.median(rest)
        print(
            f"{num} sequences: {1e3 * costs[num]:.2f} ms a step beside the walk, {1e6 * costs[num] / num:.1f} us each"
        )
    growth = (costs[1024] / 1024) / (costs[32] / 32)
    return [rows.Row("a step beside its walk, a sequence of 1,024 / one of 32, CPU time", growth, "x", "< 1.5", 40)]


BENCHES: dict[str, tuple[str, Callable[[BaseModel, argparse.Namespace], list[rows.Row]]]] = {
    "runs": (MIDDLE, bench_runs),
    "group": (MIDDLE, bench_group),
    "deterministic": (MIDDLE, bench_deterministic),
    "long": (SMALL, bench_long),
    "memory": (SMALL, bench_memory),
    "steps": (SMALL, bench_steps),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--batched-products", action="store_true", help="adapters without the compiled program")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    rows.add_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(WARNING))
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            size, bench = BENCHES[name]
            rows.save(args.rows, bench(random_base(size, Path(scratch)), args))


if __name__ == "__main__":
    main()
