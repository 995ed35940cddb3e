"""How close is a training pass to the machine's limit, and what do adapters, company and determinism cost?

    python benchmarks/training_rows.py --case 64x1x32-64
    python benchmarks/training_rows.py --case 64x1x32-64 --defaults

A case is runs x data x tokens of a datum. CPU seconds of one forward and backward on random weights, medians; the arms
take turns in one process, with the allocator set as in a worker (`run_all.py` does that):

    ours            one pass over all runs
    frozen          the same pass without any adapter: the floor
    one run         the same data, all of one run
    deterministic   `ours` in deterministic mode

The share of sgemm is (4 N + 6 N_lora) · tokens + attention, over the time of `ours`, as a share of what a product of
2048 x 2048 x 2048 reaches in the same process: torch.mm, and beside it one with a packed weight, as a pass's own are,
which is faster. N: weights of the layers and the output head, each multiplied with every token once forward and once
backward (2 N for those that read the embeddings, to which no gradient goes); N_lora: an adapter's parameters, with the
gradient thrice; attention: 6 · tokens² · heads · head size a sequence and layer, the causal half of the square.
`--defaults`: the SDK's own settings, rank 32 on all layers and the output head; else rank 16 on the layers, as peft is
usually set.

`--short` instead: what a datum of three tokens costs beyond its tokens, and what deterministic mode, which takes each
datum alone, adds to that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import no_adapters
import numpy as np
import rows
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinsmith.config import Settings
from tinsmith.model import BaseModel, FrozenMatrix, load_base
from tinsmith.training import Trainer
from tinsmith.training.budget import USEFUL_TOKENS
from tinsmith.types import BaseInfo, Datum, LossSpec, OpId, RunId, RunSpec, Targets, TrainItem

HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 512, 1536, 8, 4, 64, 32000
SQUARE = 2048
PACK_TOKENS = USEFUL_TOKENS["cpu"]
Arm = Callable[[], Any]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as path:
        info = make_model(path, args.layers)
        what = "rank 32 on all layers and the head" if args.defaults else "rank 16 on the layers"
        print(f"hidden {HIDDEN} x {args.layers} layers, vocabulary {VOCAB}, {what}, {args.threads} thread(s)\n")
        if args.short:
            report_short(info, args)
        else:
            report(info, args)


def report(info: BaseInfo, args: argparse.Namespace) -> None:
    runs, data, tokens = args.case.split("x")
    low, high = ([int(n) for n in tokens.split("-")] * 2)[:2]
    rng = np.random.default_rng(0)
    lengths = rng.integers(low, high + 1, int(runs))
    work = [[make_datum(rng, n) for _ in range(int(data))] for n in lengths]
    base, stable = (load_base(info, device=torch.device("cpu"), dtype=torch.float32, deterministic=d) for d in (0, 1))
    rank, targets = (32, Targets()) if args.defaults else (16, Targets(unembed=False))
    arms = {
        "ours": arm(base, work, rank, targets),
        "frozen": arm(no_adapters.frozen_base(info), work, 1, no_adapters.TARGETS),
        "one run": arm(base, [[datum for own in work for datum in own]], rank, targets),
        "deterministic": arm(stable, work, rank, targets, deterministic=True),
        "torch.mm": square_product(packed=False),
        "packed product": square_product(packed=True),
    }
    s = measure(arms, args.repeats)
    num_tokens = sum(lengths) * int(data)
    flops = sum(int(data) * flops_of(base, int(n), rank, targets) for n in lengths)
    speed = flops / s["ours"] / 1e9
    plain, packed = (2 * SQUARE**3 / s[name] / 1e9 for name in ("torch.mm", "packed product"))
    print(
        f"{num_tokens} tokens, {flops / 1e9:.0f} GFLOP: {speed:.1f} GFLOP/s; torch.mm reaches {plain:.1f}, a product "
        f"on a packed weight {packed:.1f}\n"
    )
    print("| arm | CPU s |\n|---|---|")
    print("\n".join(f"| {name} | {value:.3f} |" for name, value in s.items()))
    defaults = ", SDK's defaults" if args.defaults else ""
    case = f"training, {runs} run(s) of {data} x {tokens} tokens, {args.layers} layer(s){defaults}"
    aim = (lambda text: "") if args.defaults else (lambda text: text)
    made = [
        rows.Row(f"{case}: share of torch.mm", speed / plain, "", aim(">= 0.75"), args.repeats),
        rows.Row(f"{case}: share of a product on a packed weight", speed / packed, "", "", args.repeats),
        rows.Row(f"{case}: CPU time / frozen base alone", s["ours"] / s["frozen"], "x", aim("< 1.12"), args.repeats),
        rows.Row(f"{case}: speed / one run with all data", s["one run"] / s["ours"], "x", aim(">= 0.95"), args.repeats),
        rows.Row(f"{case}: deterministic / default", s["deterministic"] / s["ours"], "x", aim("< 1.4"), args.repeats),
    ]
    print("\n" + "\n".join([rows.HEAD, *map(str, made)]))
    rows.save(args.rows, made)


def report_short(info: BaseInfo, args: argparse.Namespace) -> None:
    """1,030 data of three tokens in one request, against 10 data of 309."""
    rng = np.random.default_rng(0)
    base, stable = (load_base(info, device=torch.device("cpu"), dtype=torch.float32, deterministic=d) for d in (0, 1))
    rank, targets = (32, Targets()) if args.defaults else (16, Targets(unembed=False))
    short, long = ([make_datum(rng, length) for _ in range(count)] for count, length in ((1030, 3), (10, 309)))
    arms = {
        "short": arm(base, [short], rank, targets),
        "long": arm(base, [long], rank, targets),
        "short, deterministic": arm(stable, [short], rank, targets, deterministic=True),
    }
    s = measure(arms, args.repeats)
    print("\n".join(f"{name}: {value:.3f} CPU s" for name, value in s.items()))
    what = "training, 1030 data of 3 tokens" + (", SDK's defaults" if args.defaults else "")
    made = [
        rows.Row(f"{what} / 10 of 309", s["short"] / s["long"], "x", "", args.repeats),
        rows.Row(f"{what}: deterministic / default", s["short, deterministic"] / s["short"], "x", "", args.repeats),
    ]
    print("\n" + "\n".join([rows.HEAD, *map(str, made)]))
    rows.save(args.rows, made)


def measure(arms: Mapping[str, Arm], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each arm; the first two rounds, in which memory is taken, don't count."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(-2, repeats):
        for name, run in arms.items():
            started = time.process_time()
            run()
            if repeat >= 0:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def arm(
    base: BaseModel, work: Sequence[Sequence[Datum]], rank: int, targets: Targets, *, deterministic: bool = False
) -> Arm:
    """One pass over all runs."""
    settings = Settings(deterministic=deterministic)
    trainer = Trainer(base, settings)
    items = []
    for index, own in enumerate(work):
        run = RunId(f"r{index:03}")
        trainer.create_run(RunSpec(run, base.info.name, rank, index, targets))
        items.append(TrainItem(OpId(run), run, 1, tuple(own), LossSpec("cross_entropy"), backward=True))

    def step() -> None:
        training_pass = trainer.start_pass(items)
        while training_pass.advance(PACK_TOKENS):
            pass
        training_pass.commit()

    return step


def square_product(*, packed: bool) -> Arm:
    x, weight = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)
    if not packed:
        return lambda: torch.mm(x, weight)
    matrix = FrozenMatrix(weight)
    return lambda: matrix.times(x)


def flops_of(base: BaseModel, length: int, rank: int, targets: Targets) -> float:
    """Of one sequence, forward and backward; the gradient of the embeddings isn't made."""
    frozen = sum(linear.in_features * linear.out_features for linear in base.linears)
    spared = sum(x.in_features * x.out_features for x in base.linears if x.lead == base.linears[0].lead)
    lora = sum(rank * (x.in_features + x.out_features) for x in base.linears if x.is_targeted(targets))
    return (4 * frozen - 2 * spared + 6 * lora) * length + 6 * length**2 * HEADS * HEAD_DIM * base.num_layers


def make_model(path: str, layers: int) -> BaseInfo:
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(path)
    return BaseInfo("bench", path, "qwen3", VOCAB, 4096, ())


def make_datum(rng: np.random.Generator, length: int) -> Datum:
    tokens = rng.integers(0, VOCAB, length + 1)
    return Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="64x1x32-64", help="runs x data x tokens, such as 4x4x128")
    parser.add_argument("--short", action="store_true", help="many data of three tokens instead of a case")
    parser.add_argument("--defaults", action="store_true", help="rank 32 on all layers and the output head")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    rows.add_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
