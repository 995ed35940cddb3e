"""Tokens a second of a mixture of experts against the number of requests that are sampled at once.

    python benchmarks/expert_crowd.py

A decode step of few sequences has less than a row for most experts, and reads the weights of all that are chosen; with
thousands each expert's product is full. A random Qwen3-MoE samples short answers, 1 to 8,192 requests at once, with
seats for all (`max_resident_samples`) and a step's prompts as large as their number asks for; the levels are taken in
turns. Prints tokens a second of processor time, so that others on the machine don't count; the rows of an expert in the
fullest step, counted there; and each level's part of the fastest one's rate.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import numpy as np
import rows
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tinsmith.config import Settings
from tinsmith.machine import heap
from tinsmith.model import BaseModel
from tinsmith.model.loading import load_base
from tinsmith.sampling import Sampler
from tinsmith.types import BaseInfo, OpId, SampleItem, SamplingParams

VOCAB, LAYERS, EXPERTS, CHOSEN = 2048, 2, 32, 4
PROMPT = 4
SEATS = 10_240  # a tenant alone leaves an eighth free
PREFILL_TOKENS = 8192
WORKER = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


class NoText:
    def decode(self, ids: object) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 8, 64, 512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=8, help="that each request samples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    rows.add_flag(parser)
    args = parser.parse_args()
    if not os.environ.keys() >= WORKER.keys():  # read by the C library when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**WORKER, **os.environ})
    torch.set_num_threads(args.threads)
    found: dict[int, list[Rate]] = {level: [] for level in args.levels}
    with tempfile.TemporaryDirectory() as directory:
        base = make_base(Path(directory))
        settings = Settings(
            kv_cache_mib=2048, prefix_cache_mib=0, max_resident_samples=SEATS, prefill_chunk_tokens=PREFILL_TOKENS
        )
        sampler = Sampler(base, settings, NoText())
        heap.settle()  # as a worker does
        run(sampler, min(args.levels), args.tokens, 0)
        for repeat in range(args.repeats):
            for level in args.levels:
                found[level].append(run(sampler, level, args.tokens, repeat + 1))
    report(args, found)


def make_base(path: Path) -> BaseModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=256, moe_intermediate_size=128, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=1, head_dim=32, num_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        decoder_sparse_step=1, norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    info = BaseInfo("mixture", str(path), "qwen3_moe", VOCAB, 4096, ())
    return load_base(info, device=torch.device("cpu"), dtype=torch.float32)


class Rate(NamedTuple):
    """tokens_s: sampled tokens a second of processor time, of whole requests. most: rows of the fullest step."""

    tokens_s: float
    most: int


def run(sampler: Sampler, level: int, tokens: int, seed: int) -> Rate:
    rng = np.random.default_rng(seed)
    for index in range(level):
        prompt = rng.integers(0, VOCAB, PROMPT).astype(np.int32)
        params = SamplingParams(max_tokens=tokens, stop_tokens=())
        sampler.submit(SampleItem(OpId(f"{seed}-{index}"), None, prompt, params, 1, seed * 10_000 + index))
    started, num_ended, most = time.process_time(), 0, 0
    while num_ended < level:
        num_ended += len(sampler.step())
        most = max(most, sampler.num_running)
    return Rate(level * tokens / (time.process_time() - started), most)


def report(args: argparse.Namespace, found: dict[int, list[Rate]]) -> None:
    rates = {level: float(np.median([rate.tokens_s for rate in own])) for level, own in found.items()}
    best = max(rates.values())
    model = f"Qwen3-MoE, {LAYERS} layers, {CHOSEN} of {EXPERTS} experts"
    made = []
    for level, rate in rates.items():
        what = f"{model}: {level:,} requests"
        target = ">= 0.9" if level == max(rates) else ""
        most = max(each.most for each in found[level])
        made += [
            rows.Row(f"{what} at once", rate, "tok/s", "", args.repeats),
            rows.Row(f"{what}, rows of an expert in the fullest step", most * CHOSEN / EXPERTS, "", "", args.repeats),
            rows.Row(f"{what} / the fastest level", rate / best, "x", target, args.repeats),
        ]
    print(rows.HEAD)
    print("\n".join(map(str, made)))
    rows.save(args.rows, made)


if __name__ == "__main__":
    main()
