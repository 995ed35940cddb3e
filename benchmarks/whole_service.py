"""What of the engine's speed arrives at SDK clients? A random Qwen3 of 5.2 million parameters, rank 8.

Runs of 4 x 128 tokens train through the SDK against a real server; sixteen at once, pipelined, also against the same
engine called in process, in turns. The peer is another server's published figures on two such cores: one run 1,329
tokens a second, sixteen 654 together, 32 samples at once 405.

    python benchmarks/whole_service.py [--repeats 5] [--steps 3] [--threads 2] [--defaults]

`--defaults`: the SDK's own settings, rank 32 with the output head.
"""

from __future__ import annotations

import os

from tinsmith.machine.cpu import math_env
from tinsmith.serve.main import WORKER_DEFAULTS

os.environ.update({**math_env(), **WORKER_DEFAULTS, **os.environ})  # read when torch loads

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import random_qwen3
import rows
import tinker
import torch
from served import Server, serving
from tinker import types

from tinsmith.config import point_sdk_at
from tinsmith.types import Targets

NUM_RUNS, NUM_DATA, NUM_TOKENS = 16, 4, 128
ONE_RUN, SIXTEEN_RUNS, SAMPLES = 1329, 654, 405  # tokens a second, of the peer
NUM_SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 64


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    print(rows.HEAD)
    with tempfile.TemporaryDirectory() as root:
        base_model = random_qwen3.make(Path(root, "model"))
        flags = ("--base-model", base_model, "--threads", str(args.threads))
        with serving(Path(root, "data"), *flags) as server:
            point_sdk_at(server.url, server.key)
            for row in measure(server, base_model, args):
                print(row, flush=True)
                rows.save(args.rows, [row])


def measure(server: Server, base_model: str, args: argparse.Namespace) -> list[rows.Row]:
    client = tinker.ServiceClient()
    rank = random_qwen3.DEFAULT_RANK if args.defaults else random_qwen3.RANK
    targets = Targets() if args.defaults else random_qwen3.TARGETS
    runs = [create(client, rank, targets) for _ in range(NUM_RUNS)]
    data = random_qwen3.sdk_data(types, NUM_DATA, NUM_TOKENS)
    alone = random_qwen3.Alone(base_model, NUM_RUNS, NUM_DATA, NUM_TOKENS, args.threads, rank=rank, targets=targets)
    train(runs, data, 1)
    alone.step()
    one, many, engine = [], [], []
    for _ in range(args.repeats):
        started = time.perf_counter()
        for _ in range(args.steps):
            train(runs[:1], data, 1)
        one.append(args.steps * NUM_DATA * NUM_TOKENS / (time.perf_counter() - started))
        started = time.perf_counter()
        train(runs, data, args.steps)
        many.append(args.steps * NUM_RUNS * NUM_DATA * NUM_TOKENS / (time.perf_counter() - started))
        started = time.perf_counter()
        for _ in range(args.steps):
            alone.step()
        engine.append(args.steps * NUM_RUNS * NUM_DATA * NUM_TOKENS / (time.perf_counter() - started))
    ratio = statistics.median(many) / statistics.median(engine)
    count = args.repeats
    what = "whole service, 5.2M parameters, SDK" + ("'s defaults" if args.defaults else "")
    aim = (lambda text: "") if args.defaults else (lambda text: text)
    return [
        rows.Row(f"{what}: 1 run of 4 x 128", statistics.median(one), "tok/s", aim(f">= {ONE_RUN}"), count),
        rows.Row(f"{what}: 16 runs of 4 x 128", statistics.median(many), "tok/s", aim(f">= {4 * SIXTEEN_RUNS}"), count),
        rows.Row(f"{what}: 16 runs, the engine in process", statistics.median(engine), "tok/s", "", count),
        rows.Row(f"{what}: 16 runs pipelined / in process", ratio, "x", aim(">= 0.9"), count),
        rows.Row(f"{what}: 32 samples at once", sampled(runs[0], args), "tok/s", aim(f">= {4 * SAMPLES}"), count),
    ]


def train(runs: list[Any], data: list[Any], steps: int) -> None:
    """Every call of every run is sent before the first is awaited."""
    sent = []
    for _ in range(steps):
        for run in runs:
            sent.append(run.forward_backward(data, "cross_entropy"))
            sent.append(run.optim_step(types.AdamParams(learning_rate=random_qwen3.LEARNING_RATE)))
    for call in sent:
        call.result()


def sampled(run: Any, args: argparse.Namespace) -> float:
    """Tokens a second over all samples, which are drawn from a run's weights."""
    sampler = run.save_weights_and_get_sampling_client()
    sampler = sampler.result() if hasattr(sampler, "result") else sampler
    rates = []
    for repeat in range(args.repeats + 1):
        started = time.perf_counter()
        sent = []
        for index in range(NUM_SAMPLES):
            prompt = types.ModelInput.from_ints([(index + at) % random_qwen3.VOCAB for at in range(PROMPT_TOKENS)])
            params = types.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, seed=repeat * NUM_SAMPLES + index)
            sent.append(sampler.sample(prompt, num_samples=1, sampling_params=params))
        num_tokens = sum(len(sequence.tokens) for call in sent for sequence in call.result().sequences)
        if repeat:
            rates.append(num_tokens / (time.perf_counter() - started))
    return statistics.median(rates)


def create(client: Any, rank: int, targets: Targets) -> Any:
    made = client.create_lora_training_client(random_qwen3.BASE, rank=rank, train_unembed=targets.unembed)
    return made.result() if hasattr(made, "result") else made  # a future of the client since SDK 0.38


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the engine, in the server and in process")
    parser.add_argument("--defaults", action="store_true", help="rank 32 on all layers and the output head")
    rows.add_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
