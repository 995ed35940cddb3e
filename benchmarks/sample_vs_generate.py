"""How fast many runs are sampled together, against transformers' generate one request after another.

Both sides run the same weights in float32 with the same thread count, each request with its own LoRA adapter where the
table says so (peft's `set_adapter` on the side of transformers). Timings are CPU time of the process; the sides
alternate and the median of the repeats is shown. With `--generate-requests` the peer, for whom a request takes as long
whatever comes after it, answers so many of them in a repeat, in turn.

    python benchmarks/sample_vs_generate.py [--model DIR] [--random 512x8x32000] [--rank 16] [--threads 1] [--tokens 64]
        [--repeats 3] [--cases 32:32] [--generate-requests 8]
"""

from __future__ import annotations

import os

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import rows
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

import tinsmith
from tinsmith.bases.catalog import describe, parse
from tinsmith.config import Settings
from tinsmith.model import BaseModel, RowLayout, init_row, load_base
from tinsmith.model.layout import HEAD_STATE_NAME
from tinsmith.sampling import Sampler
from tinsmith.types import BaseInfo, OpId, RunId, RunSpec, RunState, SampleItem, SamplingParams, Targets

TINY = Path(tinsmith.__file__).parent / "assets" / "tiny"
PROMPT_TOKENS = 32
ALL = Targets()


class NoText:
    def decode(self, ids: Sequence[int]) -> str:
        return ""


@dataclass(frozen=True)
class Case:
    num_sequences: int
    num_adapters: int


CASES = ("1:0", "8:0", "32:0", "1:1", "8:8", "32:4", "32:32")
TARGETS_X = {"1:1": ">= 1", "32:32": ">= 10"}  # by case, on the shipped model


def random_base(size: str, folder: Path) -> BaseModel:
    """A random Qwen3 of HIDDENxLAYERSxVOCABULARY in float32, saved in `folder` on the way."""
    hidden, layers, vocab = map(int, size.split("x"))
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=16384, initializer_range=0.05,
    )  # fmt: skip
    path = folder / size
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(path)
    return load_base(
        BaseInfo(size, str(path), "qwen3", vocab, 16384, ()), device=torch.device("cpu"), dtype=torch.float32
    )


def make_states(base: BaseModel, count: int, rank: int, targets: Targets = ALL) -> list[RunState]:
    states = []
    for index in range(count):
        spec = RunSpec(RunId(f"run{index}"), base.info.name, rank=rank, targets=targets, seed=index)
        layout = RowLayout.of(base.linears, spec)
        row = init_row(layout, spec)
        row += 0.01 * torch.randn(row.shape, generator=torch.Generator().manual_seed(index))
        states.append(RunState(spec, 0, layout.row_to_tensors("param", row)))
    return states


def make_peft(base: BaseModel, states: Sequence[RunState], rank: int) -> torch.nn.Module:
    """The same adapters in peft, by the names run0, run1, ..."""
    model = AutoModelForCausalLM.from_pretrained(base.info.path, dtype=torch.float32)
    if not states:
        return model
    names = [info.name for info in base.linears]
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config, adapter_name="run0")
        for state in states[1:]:
            model.add_adapter(state.spec.run_id, config)
    for state in states:
        for name in names:
            layer = model.get_submodule(f"base_model.model.{name}")
            stored = HEAD_STATE_NAME if name == "lm_head" else name
            for part, holder in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                holder[state.spec.run_id].weight.data.copy_(torch.from_numpy(state.tensors[f"param/{stored}.{part}"]))
    return model.eval()


def prompts(case: Case, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (case.num_sequences, PROMPT_TOKENS)).astype(np.int32)


def run_sampler(sampler: Sampler, case: Case, vocab_size: int, num_tokens: int) -> list[float]:
    """Seconds of each step."""
    params = SamplingParams(max_tokens=num_tokens, stop_tokens=())
    for index, prompt in enumerate(prompts(case, vocab_size)):
        adapter = f"run{index % case.num_adapters}" if case.num_adapters else None
        sampler.submit(SampleItem(OpId(f"op{index}"), adapter, prompt, params, 1, index))
    steps = []
    while sampler.num_samples:
        started = time.process_time()
        sampler.step()
        steps.append(time.process_time() - started)
    return steps


def run_generate(
    model: torch.nn.Module, case: Case, vocab_size: int, num_tokens: int, turn: range | None = None
) -> float:
    """Seconds for these requests (without `turn`: for all), one after another, each with its adapter set."""
    asked = prompts(case, vocab_size)
    started = time.process_time()
    for index in range(len(asked)) if turn is None else turn:
        prompt = asked[index]
        if case.num_adapters:
            model.set_adapter(f"run{index % case.num_adapters}")
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
        )  # fmt: skip
    return time.process_time() - started


def turns(num_requests: int, size: int) -> list[range]:
    """All of them, so many at a time; 0: at once."""
    return [
        range(num_requests)[at : at + (size or num_requests)] for at in range(0, num_requests, size or num_requests)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="a Hugging Face model directory")
    parser.add_argument("--random", default="", help="instead of a model: random weights, HIDDENxLAYERSxVOCABULARY")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generate-requests", type=int, default=0, help="of the peer in a repeat, in turn; 0: all")
    parser.add_argument("--cases", nargs="+", default=CASES, help="SEQUENCES:ADAPTERS")
    rows.add_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    scratch = tempfile.TemporaryDirectory()
    if args.random:
        base = random_base(args.random, Path(scratch.name))
    else:
        base = load_base(describe(parse(args.model)), device=torch.device("cpu"), dtype=torch.float32)
    vocab_size = base.info.vocab_size
    print(
        f"{base.info.name}: {base.num_layers} layers, hidden {base.head.in_features}, vocabulary {vocab_size}; "
        f"{PROMPT_TOKENS} prompt and {args.tokens} new tokens, LoRA rank {args.rank} on every linear, "
        f"{args.threads} thread(s), median of {args.repeats}\n"
    )
    print("| sequences | adapters | ms a step | tok/s | generate, one by one: tok/s | ratio |")
    print("|---|---|---|---|---|---|")
    for case in (Case(*map(int, text.split(":"))) for text in args.cases):
        states = make_states(base, case.num_adapters, args.rank)
        sampler = Sampler(base, Settings(), NoText())
        for state in states:
            sampler.add_adapter(state.spec.run_id, state)
        model = make_peft(base, states, args.rank)
        run_sampler(sampler, case, vocab_size, 4)
        run_generate(model, Case(1, min(1, case.num_adapters)), vocab_size, 4)
        ours, theirs = [], []
        for turn in islice(cycle(turns(case.num_sequences, args.generate_requests)), args.repeats):
            ours.append(run_sampler(sampler, case, vocab_size, args.tokens))
            theirs.append(len(turn) * args.tokens / run_generate(model, case, vocab_size, args.tokens, turn))
        total = case.num_sequences * args.tokens
        step_ms = 1e3 * statistics.median(step for steps in ours for step in steps)
        speed = total / statistics.median(sum(steps) for steps in ours)
        reference = statistics.median(theirs)
        print(
            f"| {case.num_sequences} | {case.num_adapters or 'none'} | {step_ms:.2f} | {speed:.0f} | {reference:.0f} | "
            f"{speed / reference:.1f} |",
            flush=True,
        )
        what = (
            f"sampling, {case.num_sequences} request(s) with {case.num_adapters} adapter(s) of rank {args.rank}, "
            f"{base.info.name}: ours / generate, CPU time"
        )
        target = "" if args.random else TARGETS_X.get(f"{case.num_sequences}:{case.num_adapters}", "")
        rows.save(args.rows, [rows.Row(what, speed / reference, "x", target, args.repeats)])


if __name__ == "__main__":
    main()
