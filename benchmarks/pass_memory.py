"""What a token of a training pass takes in memory, and what activation checkpointing saves and costs.

For a random model of the training benchmarks' shape and for the shipped model: bytes a token as the engine measures
them at start, the peak of tensors in a whole pass of one sequence, and CPU seconds of that pass with and without
checkpointing, interleaved in this process; medians. Losses of both are compared to the bit.

    python benchmarks/pass_memory.py --tokens 1024
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tinsmith.machine.cpu import OPENMP, math_env

os.environ.update({**(OPENMP if "--plain-mkl" in sys.argv else math_env()), **os.environ})  # read when torch loads

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinsmith.bases.catalog import describe, parse
from tinsmith.config import Settings
from tinsmith.model import load_base
from tinsmith.model.peak import PeakMeter
from tinsmith.training import Trainer
from tinsmith.training.budget import Budget
from tinsmith.training.footprint import measure
from tinsmith.types import BaseInfo, Datum, LossSpec, OpId, RunId, RunSpec, TrainItem, TrainResult

RANK = 32
CHUNK_TOKENS = 512
MODES = {"kept": "never", "recomputed": "always"}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"one sequence of {args.tokens} tokens, rank {RANK} on every layer and the head, {args.threads} thread(s); "
        f"median of {args.repeats}\n"
    )
    print("| model | bytes a token, kept | recomputed | ratio | peak of a pass, kept | recomputed | CPU time |")
    print("|---|---|---|---|---|---|---|")
    with bench_model() as info:
        report("hidden 512 x 8 layers, vocabulary 32,000", info, args)
    report("tinsmith/tiny", describe(parse("tinsmith/tiny")), args)


@contextmanager
def bench_model() -> Iterator[BaseInfo]:
    """The shape of train_vs_peft.py."""
    with tempfile.TemporaryDirectory() as path:
        config = Qwen3Config(
            vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(path)
        yield BaseInfo("bench", path, "qwen3", 32000, 32768, ())


def report(name: str, info: BaseInfo, args: argparse.Namespace) -> None:
    base = load_base(info, device=torch.device("cpu"), dtype=torch.float32)
    footprint = measure(base, CHUNK_TOKENS)
    trainer = Trainer(base, Settings(loss_chunk_tokens=CHUNK_TOKENS))
    run = RunId("r")
    trainer.create_run(RunSpec(run, info.name, RANK))
    tokens = np.random.default_rng(0).integers(0, info.vocab_size, args.tokens + 1)
    datum = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:]})
    items = [TrainItem(OpId("op"), run, 1, (datum,), LossSpec("cross_entropy"), backward=True)]
    seconds: dict[str, list[float]] = {arm: [] for arm in MODES}
    losses: set[float] = set()
    peaks: dict[str, float] = {}
    for repeat in range(args.repeats + 1):
        for arm, mode in MODES.items():
            trainer.budget = Budget(Settings(activation_checkpointing=mode), base.device)
            if not repeat:
                meter = PeakMeter()
                with meter:
                    compute(trainer, items)
                peaks[arm] = meter.peak / 2**20
                continue
            started = time.process_time()
            losses.add(compute(trainer, items))
            seconds[arm].append(time.process_time() - started)
    assert len(losses) == 1, "checkpointing has changed the loss"
    cost = statistics.median(seconds["recomputed"]) / statistics.median(seconds["kept"])
    ratio = footprint.kept / footprint.recomputed
    print(
        f"| {name} | {footprint.kept:,.0f} | {footprint.recomputed:,.0f} | {ratio:.1f} | "
        f"{peaks['kept']:.0f} MiB | {peaks['recomputed']:.0f} MiB | {cost:.2f} x |",
        flush=True,
    )


def compute(trainer: Trainer, items: list[TrainItem]) -> float:
    training_pass = trainer.start_pass(items)
    while training_pass.advance(10**6):
        pass
    (result,) = training_pass.commit()
    assert isinstance(result, TrainResult), result
    return result.metrics["loss:sum"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain-mkl", action="store_true", help="without MKL's bitwise mode (MKL_CBWR)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
