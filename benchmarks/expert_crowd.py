"""Tokens a second of a mixture of experts against the number of requests that are decoded at once.

    python benchmarks/expert_crowd.py

A decode step of few sequences has less than a row for most experts, and reads the weights of all that are chosen; with
thousands each expert's product is full. A random Qwen3-MoE samples 1 to 8,192 requests, with seats for all
(`max_resident_samples`), a step's prompts as large as their number asks for, and answers so long that the last request
has come in before the first ends: the script fails where a level is never decoded together. The greatest level is
sampled through an adapter too, in experts as elsewhere. Levels are taken in turns. Prints tokens a second of processor
time, so that others on the machine don't count; the rows that an expert has in a step that decodes all of a level, the
least of any expert and the mean, counted from the routers' choices; and each level's part of the fastest one's rate.
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
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tinsmith.config import Settings
from tinsmith.machine import heap
from tinsmith.model import BaseModel, RowLayout, init_row, load_base
from tinsmith.model.experts import Experts
from tinsmith.sampling import Sampler
from tinsmith.types import BaseInfo, OpId, RunId, RunSpec, RunState, SampleItem, SamplingParams

Arm = tuple[int, str | None]  # how many requests, and through which adapter

VOCAB, LAYERS, EXPERTS, CHOSEN = 2048, 2, 32, 4
PROMPT = 4
SEATS = 10_240  # a tenant alone leaves an eighth free
PREFILL_TOKENS = 8192  # 1,024 requests of a line come in with a step
RUN = RunSpec(RunId("a"), "mixture", rank=16, seed=1)
WORKER = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


class NoText:
    def decode(self, ids: object) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 8, 64, 512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=24, help="that each request samples")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    rows.add_flag(parser)
    args = parser.parse_args()
    if not os.environ.keys() >= WORKER.keys():  # read by the C library when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**WORKER, **os.environ})
    torch.set_num_threads(args.threads)
    arms: list[Arm] = [(level, None) for level in args.levels]
    arms.append((max(args.levels), RUN.run_id))
    found: dict[Arm, list[Rate]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as directory:
        base = make_base(Path(directory))
        sampler, loads = make_sampler(base), Loads(base)
        heap.settle()  # as a worker does
        run(sampler, loads, (min(args.levels), None), args.tokens, 0)
        for repeat in range(args.repeats):
            for arm in arms:
                found[arm].append(run(sampler, loads, arm, args.tokens, repeat + 1))
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


def make_sampler(base: BaseModel, seats: int = SEATS, prefill_tokens: int = PREFILL_TOKENS) -> Sampler:
    """With an adapter under the name of its run, whose B isn't zero."""
    settings = Settings(
        kv_cache_mib=2048, prefix_cache_mib=0, max_resident_samples=seats, prefill_chunk_tokens=prefill_tokens
    )
    sampler = Sampler(base, settings, NoText())
    layout = RowLayout.of(base.linears, RUN)
    tensors = layout.row_to_tensors("param", init_row(layout, RUN))
    rng = np.random.default_rng(1)
    for name, array in tensors.items():
        if name.endswith("lora_B"):
            array[...] = rng.normal(0, 0.02, array.shape)
    sampler.add_adapter(RUN.run_id, RunState(RUN, 0, tensors))
    return sampler


class Loads:
    """Counts the rows of each expert in a step, while it is asked to."""

    def __init__(self, base: BaseModel) -> None:
        self._num_rows = 0
        self._counts: list[Tensor] = []
        for module in base.backbone.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        """A walk has the rows of its sequences first, then those of prompts and filler."""
        if self._num_rows:
            self._counts.append(torch.bincount(args[1][: self._num_rows].reshape(-1), minlength=EXPERTS))

    def of_step(self, sampler: Sampler) -> tuple[int, Tensor]:
        """How many requests a step ends, and how many of its decoded rows went to each expert of each layer, [L, E]."""
        self._counts, self._num_rows = [], sampler.num_running
        num_ended = len(sampler.step())
        self._num_rows = 0
        return num_ended, torch.stack(self._counts)


class Rate(NamedTuple):
    """tokens_s: sampled tokens a second of processor time, of whole requests. least, mean: rows of an expert in the
    first step that decodes all of them."""

    tokens_s: float
    least: int
    mean: float


def run(sampler: Sampler, loads: Loads, arm: Arm, tokens: int, seed: int) -> Rate:
    """Raises: SystemExit: the requests are never decoded all together."""
    level, adapter = arm
    rng = np.random.default_rng(seed)
    for index in range(level):
        prompt = rng.integers(0, VOCAB, PROMPT).astype(np.int32)
        params = SamplingParams(max_tokens=tokens, stop_tokens=())
        item = SampleItem(OpId(f"{seed}-{index}"), adapter, prompt, params, 1, seed * 10_000 + index)
        sampler.submit(item)
    started, num_ended, most = time.process_time(), 0, 0
    rows_LE: Tensor | None = None
    while num_ended < level:
        most = max(most, sampler.num_running)
        if rows_LE is None and sampler.num_running == level:
            ended, rows_LE = loads.of_step(sampler)
        else:
            ended = len(sampler.step())
        num_ended += ended
    took_s = time.process_time() - started
    if rows_LE is None:
        raise SystemExit(f"of {level:,} requests at most {most:,} were decoded together: more --tokens, or seats")
    return Rate(level * tokens / took_s, int(rows_LE.min()), float(rows_LE.double().mean()))


def report(args: argparse.Namespace, found: dict[Arm, list[Rate]]) -> None:
    rates = {arm: float(np.median([rate.tokens_s for rate in own])) for arm, own in found.items()}
    best = max(rate for (_, adapter), rate in rates.items() if adapter is None)
    model = f"Qwen3-MoE, {LAYERS} layers, {CHOSEN} of {EXPERTS} experts"
    made = []
    for (level, adapter), rate in rates.items():
        what = f"{model}: {level:,} request{'s' if level > 1 else ''} at once"
        if adapter is not None:
            what += f" through an adapter of rank {RUN.rank}"
            made.append(rows.Row(what, rate, "tok/s", "", args.repeats))
            made.append(rows.Row(f"{what} / without", rate / rates[level, None], "x", "", args.repeats))
            continue
        own = found[level, None]
        target = ">= 0.9" if level == max(args.levels) else ""
        made += [
            rows.Row(what, rate, "tok/s", "", args.repeats),
            rows.Row(f"{what}, least rows of an expert", min(each.least for each in own), "", "", args.repeats),
            rows.Row(f"{what}, mean rows of an expert", own[0].mean, "", "", args.repeats),
            rows.Row(f"{what} / the fastest level", rate / best, "x", target, args.repeats),
        ]
    print(rows.HEAD)
    print("\n".join(map(str, made)))
    rows.save(args.rows, made)


if __name__ == "__main__":
    main()
