"""Does one shared pass beat running the adapters one after another?

Prints tokens per CPU-second of one forward and backward for many runs, ours against peft's `set_adapter` loop, both in
this process, on the same random weights, interleaved; medians. With `--defaults` both have the SDK's own settings: rank
32 on all layers and the output head. `frozen` is the shared pass without any adapter: the floor. With `--peft-runs` the
peer, which takes as long for each run whatever stands beside it, computes so many of them in a repeat, in turn.

    python benchmarks/train_vs_peft.py --runs 16 64 --tokens 32-64 [--peft-runs 16] [--no-frozen]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain, cycle

from tinsmith.machine.cpu import OPENMP, math_env

os.environ.update({**(OPENMP if "--plain-mkl" in sys.argv else math_env()), **os.environ})  # read when torch loads

import no_adapters
import numpy as np
import rows
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tinsmith.config import Settings
from tinsmith.model import load_base
from tinsmith.training import Trainer
from tinsmith.training.budget import USEFUL_TOKENS
from tinsmith.types import BaseInfo, Datum, LossSpec, OpId, RunId, RunSpec, Targets, TrainItem

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = Targets(unembed=False)  # as peft's usual target_modules
TARGETS_X = {(16, 1): ">= 1.6", (64, 1): ">= 2.3"}  # by runs and data
TARGET_X = ">= 1"  # of several data a run


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as path:
        config = Qwen3Config(
            vocab_size=args.vocab, hidden_size=512, intermediate_size=1536, num_hidden_layers=args.layers,
            num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(path)
        info = BaseInfo("bench", path, "qwen3", args.vocab, 4096, ())
        print(
            f"hidden 512 x {args.layers} layers, vocabulary {args.vocab}, rank {args.rank}, {args.threads} thread(s), "
            f"{calibrate():.0f} GFLOP/s sgemm; tokens per CPU-second, median of {args.repeats}\n"
        )
        print("| runs | data x tokens | tokens | peft | ours | frozen | ours / peft | ours / frozen |")
        print("|---|---|---|---|---|---|---|---|")
        for num_runs in args.runs:
            report(num_runs, args, info)


def report(num_runs: int, args: argparse.Namespace, info: BaseInfo) -> None:
    rng = np.random.default_rng(0)
    low, high = ([int(n) for n in args.tokens.split("-")] * 2)[:2]
    lengths = rng.integers(low, high + 1, num_runs)
    data = [[make_datum(rng, n, args.vocab) for _ in range(args.data)] for n in lengths]
    arms = {"peft": peft_arm(data, args, info), "ours": our_arm(data, args, info, adapters=True)}
    if not args.no_frozen:
        arms["frozen"] = our_arm(data, args, info, adapters=False)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(args.repeats + 1):
        for name, arm in arms.items():
            started = time.process_time()
            num_tokens = arm()
            if repeat:
                rates[name].append(num_tokens / (time.process_time() - started))
    rate = {name: statistics.median(values) for name, values in rates.items()}
    ratio = rate["ours"] / rate["peft"]
    floor = (f"{rate['frozen']:.0f}", f"{rate['ours'] / rate['frozen']:.2f}") if "frozen" in rate else ("", "")
    print(
        f"| {num_runs} | {args.data} x {args.tokens} | {count(data)} | {rate['peft']:.0f} | {rate['ours']:.0f} | "
        f"{floor[0]} | {ratio:.2f} | {floor[1]} |",
        flush=True,
    )
    defaults = ", SDK's defaults" if args.defaults else ""
    case = f"{num_runs} run(s) of {args.data} x {args.tokens} tokens, {args.layers} layer(s), vocabulary {args.vocab}"
    what = f"training, {case}{defaults}: ours / peft, CPU time"
    target = TARGETS_X.get((num_runs, args.data), TARGET_X if args.data > 1 else "")
    target = "" if args.defaults else target
    rows.save(args.rows, [rows.Row(what, ratio, "x", target, args.repeats)])


def count(data: list[list[Datum]]) -> int:
    return sum(datum.num_tokens for own in data for datum in own)


def our_arm(data: list[list[Datum]], args: argparse.Namespace, info: BaseInfo, *, adapters: bool) -> Callable[[], int]:
    """One pass over all runs, or the same walk over the base alone; how many tokens these were."""
    base = (
        load_base(info, device=torch.device("cpu"), dtype=torch.float32) if adapters else no_adapters.frozen_base(info)
    )
    trainer = Trainer(base, Settings())
    wanted = Targets() if args.defaults else TARGETS
    targets, rank = (wanted, args.rank) if adapters else (no_adapters.TARGETS, 1)
    items = []
    for index, own in enumerate(data):
        run = RunId(f"r{index:03}")
        trainer.create_run(RunSpec(run, info.name, rank, index, targets))
        items.append(TrainItem(OpId(run), run, 1, tuple(own), LossSpec("cross_entropy"), backward=True))

    def step() -> int:
        training_pass = trainer.start_pass(items)
        while training_pass.advance(args.max_tokens):
            pass
        training_pass.commit()
        return count(data)

    return step


def peft_arm(data: list[list[Datum]], args: argparse.Namespace, info: BaseInfo) -> Callable[[], int]:
    """Each adapter in turn, its data as one batch (they are equally long), loss from `labels`. All of them at first, so
    that all have their memory, then as many at a time as `--peft-runs` says.
    """
    model = AutoModelForCausalLM.from_pretrained(info.path, dtype=torch.float32)
    config = LoraConfig(r=args.rank, lora_alpha=32, target_modules=[*LINEARS, *["lm_head"] * args.defaults])
    peft = get_peft_model(model, config, adapter_name="r000")
    for index in range(1, len(data)):
        peft.add_adapter(f"r{index:03}", config)
    batches = [torch.from_numpy(np.stack([d.tokens for d in own])).long() for own in data]

    turns = chain([range(len(data))], cycle(batched(range(len(data)), args.peft_runs or len(data))))

    def step() -> int:
        turn = next(turns)
        for index in turn:
            peft.set_adapter(f"r{index:03}")
            peft(input_ids=batches[index], labels=batches[index]).loss.backward()
        return count([data[index] for index in turn])

    return step


def batched(indices: range, size: int) -> list[range]:
    return [indices[at : at + size] for at in range(0, len(indices), size)]


def make_datum(rng: np.random.Generator, length: int, vocab: int) -> Datum:
    tokens = rng.integers(0, vocab, length + 1)
    return Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)})


def calibrate() -> float:
    """GFLOP/s of a 768 x 512 x 1536 product, per CPU-second."""
    x, w = torch.randn(768, 512), torch.randn(512, 1536)
    x @ w
    started = time.process_time()
    for _ in range(30):
        x @ w
    return 30 * 2 * 768 * 512 * 1536 / (time.process_time() - started) / 1e9


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4, 16], help="numbers of runs to try")
    parser.add_argument("--data", type=int, default=1, help="sequences a run")
    parser.add_argument("--tokens", default="32-64", help="tokens a sequence: N, or N-M drawn for each run")
    parser.add_argument("--rank", type=int, default=0, help="16, or 32 with --defaults")
    parser.add_argument("--defaults", action="store_true", help="the SDK's: rank 32 on all layers and the output head")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=USEFUL_TOKENS["cpu"], help="tokens in one pack")
    parser.add_argument("--peft-runs", type=int, default=0, help="that the peer computes in a repeat, in turn; 0: all")
    parser.add_argument("--no-frozen", action="store_true", help="without the floor, which training_rows.py measures")
    parser.add_argument("--plain-mkl", action="store_true", help="without MKL's bitwise mode (MKL_CBWR)")
    rows.add_flag(parser)
    args = parser.parse_args()
    args.rank = args.rank or (32 if args.defaults else 16)
    return args


if __name__ == "__main__":
    main()
