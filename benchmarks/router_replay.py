"""How far are the trainer's log-probabilities from the sampler's on a mixture of experts, with its routes and without?

    python benchmarks/router_replay.py

A random Qwen3-MoE in bfloat16 samples; the trainer then scores what was sampled, once with routers that choose anew and
once with the routes that the sampler took. Both round differently, so where two experts score nearly alike a router may
choose another. Prints the mean and the largest difference of both arms, the share of choices that differ, and
the bytes of a token's routes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import numpy as np
import rows
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tinsmith.config import Settings
from tinsmith.model.loading import load_base
from tinsmith.sampling import Sampler
from tinsmith.training import Trainer
from tinsmith.types import (
    BaseInfo,
    Datum,
    LossSpec,
    OpId,
    RunId,
    RunSpec,
    SampleItem,
    SamplingParams,
    Targets,
    TrainItem,
)

VOCAB = 4096


class NoText:
    def decode(self, ids: object) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    rows.add_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        base = make_base(Path(directory), getattr(torch, args.dtype))
        anew, replayed, moved, size = [], [], [], 0
        for repeat in range(args.repeats):
            plain, taped, share, size = measure(base, args, repeat)
            anew.append(plain)
            replayed.append(taped)
            moved.append(share)
    report(args, np.array(anew), np.array(replayed), float(np.median(moved)), size)


def make_base(path: Path, dtype: torch.dtype):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=256, moe_intermediate_size=128, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, num_experts=32, num_experts_per_tok=4,
        decoder_sparse_step=1, norm_topk_prob=True, initializer_range=0.06,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    info = BaseInfo("mixture", str(path), "qwen3_moe", VOCAB, 4096, ())
    return load_base(info, device=torch.device("cpu"), dtype=dtype)


def measure(base, args: argparse.Namespace, seed: int):
    """((mean, largest) anew, (mean, largest) replayed, share of choices that differ, bytes of a token's routes)."""
    rng = np.random.default_rng(seed)
    sampler = Sampler(base, Settings(), NoText())
    items = [
        SampleItem(
            OpId(f"s{i}"), None, rng.integers(0, VOCAB, 24).astype(np.int32),
            SamplingParams(max_tokens=args.tokens, stop_tokens=()), 1, seed * 1000 + i, records_routes=True,
        )
        for i in range(args.samples)
    ]  # fmt: skip
    for item in items:
        sampler.submit(item)
    results = {}
    while len(results) < len(items):
        results.update(sampler.step())
    run = RunSpec(RunId("r"), "mixture", 8, 1, Targets())
    trainer = Trainer(base, Settings())
    trainer.create_run(run)
    data, expected, tapes = [], [], []
    for item in items:
        result = results[item.op_id]
        sequence = result.sequences[0]
        tokens = np.concatenate([item.prompt, sequence.tokens])
        tapes.append(np.concatenate([result.routes.prompt, result.routes.sequences[0]]))
        data.append(
            Datum(
                tokens[:-1].astype(np.int32),
                {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(len(tokens) - 1, np.float32)},
            )
        )
        expected.append(sequence.logprobs)
    own = recorded_of(base, sampler, data)
    share = float(np.mean([np.mean(np.sort(a, -1) != np.sort(b, -1)) for a, b in zip(tapes, own, strict=True)]))
    arms = [data, [replace(datum, routes=tape) for datum, tape in zip(data, tapes, strict=True)]]
    figures = [differences(trainer, arm, expected) for arm in arms]
    return figures[0], figures[1], share, tapes[0][0].size * 2


def recorded_of(base, sampler: Sampler, data: list[Datum]):
    """The routes of the same tokens, computed as whole prompts."""
    for index, datum in enumerate(data):
        sampler.submit(
            SampleItem(OpId(f"p{index}"), None, datum.tokens, SamplingParams(max_tokens=1), 1, 0, records_routes=True)
        )
    found = {}
    while len(found) < len(data):
        found.update(sampler.step())
    return [found[OpId(f"p{index}")].routes.prompt for index in range(len(data))]


def differences(trainer: Trainer, data: list[Datum], expected) -> tuple[float, float]:
    item = TrainItem(OpId("t"), RunId("r"), 1, tuple(data), LossSpec("cross_entropy"), backward=False)
    training_pass = trainer.start_pass([item])
    while training_pass.advance(1024) is not None:
        pass
    (result,) = training_pass.commit()
    gaps = np.concatenate(
        [np.abs(ours[-len(theirs) :] - theirs) for ours, theirs in zip(result.logprobs, expected, strict=True)]
    )
    return float(gaps.mean()), float(gaps.max())


def report(args: argparse.Namespace, anew, replayed, moved: float, size: int) -> None:
    (mean, most), (mean_replayed, most_replayed) = np.median(anew, 0), np.median(replayed, 0)
    model = f"Qwen3-MoE of 6 layers, 4 of 32 experts, {args.dtype}"
    made = [
        rows.Row(f"{model}: mean gap of trainer and sampler, routers choose anew", mean, "nats", "", args.repeats),
        rows.Row(f"{model}: the same with the sampler's routes", mean_replayed, "nats", "", args.repeats),
        rows.Row(f"{model}: largest, routers choose anew", most, "nats", "", args.repeats),
        rows.Row(f"{model}: largest with the sampler's routes", most_replayed, "nats", "", args.repeats),
        rows.Row(
            f"{model}: anew / replayed, mean",
            mean / mean_replayed if mean_replayed else float("inf"),
            "x",
            "",
            args.repeats,
        ),
        rows.Row(
            f"{model}: tokens' choices that differ between decoding and whole prompts",
            100 * moved,
            "%",
            "",
            args.repeats,
        ),
        rows.Row(f"{model}: routes of a token", size, "bytes", "", args.repeats),
    ]
    print(rows.HEAD)
    print("\n".join(map(str, made)))
    rows.save(args.rows, made)


if __name__ == "__main__":
    main()
