"""The table of one NVIDIA GPU: training, decoding and moving adapters against the machine's limits and peft.

Random weights of the real shapes, made on the device. Each row that was measured goes into a file; the page is made of
all rows of that file, so that the table can be filled in several sittings. Without a GPU every row is `not measured`;
`--smoke` runs every row on tiny shapes on the CPU and writes nothing.

    python benchmarks/bench_gpu.py [--only train-8b peft-0.6b ...] [--smoke] [--out docs/benchmarks-gpu.md]
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import gpu_arms as arms
import gpu_moving as moving
import numpy as np
import torch
from gpu_shapes import SHAPES, Machine, decode_limit, num_adapter_params, training_limit

from tinsmith.types import Targets

HERE = Path(__file__).parent
FULL = Targets()
NO_HEAD = arms.NO_HEAD
PROMPT = 512
DECODE = {False: (64, 32, 32, 128), True: (8, 4, 8, 8)}  # by smoke: sequences, adapters, rank, new tokens
PAGE = """# Benchmarks on a GPU

<!-- Made by `make bench-gpu`; run it again instead of editing. -->

What one NVIDIA H200 is to reach, and what was measured. Weights are random, shapes are real, the base is bfloat16 and
gradients are float32. How to run it: [how-to/gpu.md](how-to/gpu.md).

{machine}

| what | measured | to reach | | limit |
|---|---|---|---|---|
{table}
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One row. value: None if it wasn't measured; detail then says why, else what the limit is made of."""

    key: str
    what: str
    target: float
    unit: str
    value: float | None = None
    detail: str = ""
    measured: str = ""

    def __str__(self) -> str:
        shown = "not measured" if self.value is None else f"{self.value:.3g} {self.unit}"
        sense = "at most" if self.unit == "ms" else "at least"
        return f"| {self.what} | {shown} | {sense} {self.target:g} {self.unit} | {self.verdict} | {self.detail} |"

    @property
    def verdict(self) -> str:
        if self.value is None:
            return ""
        is_met = self.value <= self.target if self.unit == "ms" else self.value >= self.target
        return "met" if is_met else "**missed**"


Found = tuple[float, str]
Row = tuple[str, str, float, str, Callable[[Machine, int], Found]]


def share_of_limit(shape: str, rank: int, length: int, num: int, targets: Targets) -> Callable[[Machine, int], Found]:
    """Per cent of the limit that one run with `num` sequences of `length` tokens reaches."""

    def found(machine: Machine, repeats: int) -> Found:
        base, config, size = machine.base(shape), *sized(machine, shape, length)
        seconds = arms.measure(machine, {"ours": arms.training_arm(base, [[size] * num], rank, targets)}, repeats)[
            "ours"
        ]
        limit, text = training_limit(config, size)
        rate = num * size / seconds
        return 100 * rate / limit, f"{rate:,.0f} of {text}"

    return found


def tokens_a_second(shape: str, rank: int, length: int, num: int, targets: Targets) -> Callable[[Machine, int], Found]:
    def found(machine: Machine, repeats: int) -> Found:
        base, config, size = machine.base(shape), *sized(machine, shape, length)
        seconds = arms.measure(machine, {"ours": arms.training_arm(base, [[size] * num], rank, targets)}, repeats)[
            "ours"
        ]
        return num * size / seconds, training_limit(config, size)[1]

    return found


def many_against_one(
    shape: str, num_runs: int, rank: int, length: int, targets: Targets
) -> Callable[[Machine, int], Found]:
    def found(machine: Machine, repeats: int) -> Found:
        base, (_, size) = machine.base(shape), sized(machine, shape, length)
        made = {
            "many": arms.training_arm(base, [[size]] * num_runs, rank, targets),
            "one": arms.training_arm(base, [[size] * num_runs], rank, targets),
        }
        times = arms.measure(machine, made, repeats)
        return times["one"] / times["many"], f"the same {num_runs * size:,} tokens as one run"

    return found


def against_peft(shape: str, num_runs: int, rank: int, targets: Targets) -> Callable[[Machine, int], Found]:
    def found(machine: Machine, repeats: int) -> Found:
        num = 4 if machine.is_smoke else num_runs
        lengths = [[int(n)] for n in np.random.default_rng(0).integers(32, 65, num)]
        made = {
            "ours": arms.training_arm(machine.base(shape), lengths, rank, targets),
            "peft": arms.peft_arm(machine, shape, lengths, rank, targets),
        }
        times = arms.measure(machine, made, repeats)
        return times["peft"] / times["ours"], f"peft's set_adapter loop: {times['peft'] * 1e3:,.0f} ms"

    return found


def decode(cuda_graphs: str) -> Callable[[Machine, int], Found]:
    """Per cent of the limit."""

    def found(machine: Machine, repeats: int) -> Found:
        base, (config, prompt) = machine.base("8b"), sized(machine, "8b", PROMPT)
        batch, num_adapters, rank, num_tokens = DECODE[machine.is_smoke]
        seconds = arms.decode_arm(machine, base, batch, num_adapters, rank, prompt, num_tokens, cuda_graphs)
        limit, text = decode_bound(config, machine.is_smoke, machine.dtype.itemsize)
        return 100 * batch / seconds / limit, f"{batch / seconds:,.0f} of {text}"

    return found


def graphs_against_none(machine: Machine, repeats: int) -> Found:
    """A single sequence, where launches weigh most."""
    base, (_, prompt) = machine.base("8b"), sized(machine, "8b", PROMPT)
    num_tokens = DECODE[machine.is_smoke][3]
    with_graphs, without = (
        arms.decode_arm(machine, base, 1, 1, 32, prompt, num_tokens, mode) for mode in ("auto", "off")
    )
    return without / with_graphs, f"{1e3 * with_graphs:.1f} and {1e3 * without:.1f} ms a token"


def decode_bound(config: dict[str, int], is_smoke: bool, itemsize: int) -> tuple[float, str]:
    batch, num_adapters, rank, num_tokens = DECODE[is_smoke]
    context = (48 if is_smoke else PROMPT) + num_tokens * 3 // 4
    return decode_limit(config, batch, context, num_adapters * num_adapter_params(config, rank), itemsize)


def optimizer(machine: Machine, repeats: int) -> Found:
    base, num = machine.base("0.6b"), 4 if machine.is_smoke else 64
    times = arms.measure(machine, arms.optimizer_arms(base, num, 16), repeats)
    return times["theirs"] / times["ours"], f"torch.optim.AdamW(foreach=True) each: {times['theirs'] * 1e3:.1f} ms"


def loading(machine: Machine, repeats: int) -> Found:
    arm = moving.loading_arm(machine, machine.base("8b"), 32)
    return 1e3 * arms.measure(machine, {"ours": arm}, repeats)["ours"], "parameters alone, from pinned memory"


def from_disk(machine: Machine, repeats: int) -> Found:
    with moving.disk_arm(machine, machine.base("8b"), 32) as arm:
        seconds = arms.measure(machine, {"ours": arm}, repeats)["ours"]
    return 1e3 * seconds, "a file outside of the page cache, its checksum verified"


def publishing(machine: Machine, repeats: int) -> Found:
    seconds = arms.measure(machine, {"ours": moving.publishing_arm(machine.base("8b"), 32)}, repeats)["ours"]
    return 1e3 * seconds, "a copy on the device"


ROWS: tuple[Row, ...] = (
    ("train-8b", "LoRA training, Qwen3-8B shape, rank 32, 8 x 2,048 tokens: share of the limit", 50, "%",
     share_of_limit("8b", 32, 2048, 8, NO_HEAD)),
    ("train-8b-sdk", "the same with the SDK's defaults (unembedding too)", 50, "%",
     share_of_limit("8b", 32, 2048, 8, FULL)),
    ("train-0.6b", "Qwen3-0.6B shape, one sequence of 16,384 tokens, rank 16 (a published peer: 13.3k on one H100)",
     80_000, "tokens/s", tokens_a_second("0.6b", 16, 16_384, 1, NO_HEAD)),
    ("train-0.6b-2k", "the same, 8 sequences of 2,048 tokens", 80_000, "tokens/s",
     tokens_a_second("0.6b", 16, 2048, 8, NO_HEAD)),
    ("train-0.6b-sdk", "one sequence of 16,384 tokens, the SDK's defaults (rank 32, unembedding too)",
     80_000, "tokens/s",
     tokens_a_second("0.6b", 32, 16_384, 1, FULL)),
    ("many-8b", "64 runs against 1 run, same 16,384 tokens, 8B, rank 16", 0.85, "x",
     many_against_one("8b", 64, 16, 256, NO_HEAD)),
    ("many-8b-sdk", "the same with the SDK's defaults (rank 32, unembedding too)", 0.85, "x",
     many_against_one("8b", 64, 32, 256, FULL)),
    ("peft-0.6b", "64 runs of 1 x 32-64 tokens against peft one after another, 0.6B, rank 16", 20, "x",
     against_peft("0.6b", 64, 16, NO_HEAD)),
    ("peft-0.6b-sdk", "the same, 0.6B with the SDK's defaults (rank 32, unembedding too)", 20, "x",
     against_peft("0.6b", 64, 32, FULL)),
    ("peft-8b", "the same, 8B, rank 16", 6, "x", against_peft("8b", 64, 16, NO_HEAD)),
    ("peft-8b-sdk", "the same, 8B with the SDK's defaults", 6, "x", against_peft("8b", 64, 32, FULL)),
    ("decode-8b", "decode, 8B, 64 sequences, 32 distinct rank-32 adapters: share of the limit", 60, "%",
     decode("auto")),
    ("decode-8b-eager", "the same without CUDA graphs", 60, "%", decode("off")),
    ("decode-8b-one", "decode, 8B, one sequence, a rank-32 adapter: with CUDA graphs against without", 1, "x",
     graphs_against_none),
    ("optimizer", "optimizer step of 64 runs, 0.6B, rank 16, against AdamW(foreach=True) each", 10, "x", optimizer),
    ("load-8b", "a rank-32 adapter of 8B from host memory into a slot", 50, "ms", loading),
    ("load-disk-8b", "a rank-32 adapter of 8B from local disk to the sampler", 500, "ms", from_disk),
    ("publish-8b", "a run's rank-32 weights of 8B published to the sampler", 50, "ms", publishing),
)  # fmt: skip
LIMITS = {
    "train-8b": training_limit(SHAPES["8b"], 2048)[1],
    "train-8b-sdk": training_limit(SHAPES["8b"], 2048)[1],
    "train-0.6b": training_limit(SHAPES["0.6b"], 16_384)[1],
    "train-0.6b-2k": training_limit(SHAPES["0.6b"], 2048)[1],
    "train-0.6b-sdk": training_limit(SHAPES["0.6b"], 16_384)[1],
    "decode-8b": decode_bound(SHAPES["8b"], False, 2)[1],
    "decode-8b-eager": decode_bound(SHAPES["8b"], False, 2)[1],
}
MOE = Figure(
    "train-30b", "Qwen3-30B-A3B shape (published: 4.6k tokens/s a GPU on 8 H200)", 15_000, "tokens/s",
    detail="mixtures of experts have not run on a GPU yet; to be measured once they have",
)  # fmt: skip


def sized(machine: Machine, shape: str, length: int) -> tuple[dict[str, int], int]:
    """A shape's configuration and a length, or those of the smoke test."""
    return (SHAPES["tiny"], min(length, 48)) if machine.is_smoke else (SHAPES[shape], length)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="rows by name: " + ", ".join(r[0] for r in ROWS)
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; writes nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no row later than this after the start")
    parser.add_argument("--rows", type=Path, default=HERE / "gpu_rows.jsonl", help="rows measured so far")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks-gpu.md")
    args = parser.parse_args()
    wanted = [row for row in ROWS if row[0] in args.only or not args.only]
    if args.smoke:
        for figure in measure(
            wanted, Machine(torch.device("cpu"), torch.bfloat16, is_smoke=True), 1, time.monotonic() + 1e9
        ):
            print(f"{figure.key}: {figure.value:.3g} {figure.unit}, {figure.detail}", flush=True)
        return 0
    known = {f.key: f for f in load(args.rows)}
    if torch.cuda.is_available():
        machine = Machine(torch.device("cuda", 0), torch.bfloat16, is_smoke=False)
        for figure in measure(wanted, machine, args.repeats, time.monotonic() + args.seconds):
            print(figure, flush=True)
            known[figure.key] = figure
            args.rows.write_text("".join(json.dumps(asdict(f)) + "\n" for f in known.values() if f.value is not None))
    else:
        print("no CUDA GPU here: nothing is measured")
    page(args.out, known)
    print(f"written to {args.out}")
    return 0


def measure(rows: Sequence[Row], machine: Machine, repeats: int, until: float) -> Iterator[Figure]:
    """Rows one by one; one that fails says so and doesn't stop the others."""
    for key, what, target, unit, found in rows:
        if time.monotonic() > until:
            yield Figure(key, what, target, unit, detail="no time left in this session: run it with --only")
            continue
        try:
            value, detail = found(machine, repeats)
            yield Figure(key, what, target, unit, value, detail, measured=where(machine))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if machine.is_smoke:
                raise
            yield Figure(key, what, target, unit, detail=f"it failed: {str(error).splitlines()[0][:120]}")
        arms.collect(machine)


def where(machine: Machine) -> str:
    name = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else "CPU, tiny shapes"
    return f"{dt.date.today()}: {name}; torch {torch.__version__}, transformers {version('transformers')}"


def load(path: Path) -> list[Figure]:
    return [Figure(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def page(path: Path, known: dict[str, Figure]) -> None:
    figures = [
        known.get(key, Figure(key, what, target, unit, detail=LIMITS.get(key, "")))
        for key, what, target, unit, _ in ROWS
    ]
    measured = sorted({figure.measured for figure in figures if figure.measured})
    machine = "\n".join(f"* {text}" for text in measured) or "No GPU has been measured yet: every row says so."
    table = "\n".join(map(str, [*figures[:5], MOE, *figures[5:]]))
    path.write_text(PAGE.format(machine=machine, table=table))


if __name__ == "__main__":
    raise SystemExit(main())
