"""What do optimizer steps of many runs cost, against one `torch.optim.AdamW(foreach=True)` for each run?

    python benchmarks/optimizer.py
    python benchmarks/optimizer.py --defaults --runs 16
    python benchmarks/optimizer.py --no-program

64 runs of rank 16 on the layers of train_vs_peft.py's model: 1.245 million parameters each, in 112 tensors; or with
`--defaults` the SDK's own settings, rank 32 with the output head: 3.530 million in 114. `ours` computes each
run's global norm and applies and drops its gradients; the peer's `step` computes no norm. A second pair clips as well,
the peer by `clip_grad_norm_(foreach=True)`. Both in this process, interleaved, medians, with the allocator set as in a
worker. Two threads, wall time: torch shares flat rows among threads, and the peer's small tensors not (each is below
its grain of 32,768 numbers). `--threads 1` shows what is left without that, and `--no-program` torch's fused kernel on
the same rows, which serves where there is no C compiler. Both arms end with the same weights, which
is checked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import rows
import torch

from tinsmith.model import HEAD
from tinsmith.model.inspect import LinearInfo
from tinsmith.model.layout import RowLayout
from tinsmith.training.runs import RunSlot
from tinsmith.training.steps import optim_steps_for
from tinsmith.types import AdamParams, RunId, RunSpec, Targets

HIDDEN, INTER, KV, LAYERS, VOCAB = 512, 1536, 256, 8, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KV), "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INTER), "mlp.up_proj": (HIDDEN, INTER),
    "mlp.down_proj": (INTER, HIDDEN),
}  # fmt: skip
SPEC = RunSpec(RunId("bench"), "bench", 16, targets=Targets(unembed=False))
CPU = torch.device("cpu")
WORKER = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--defaults", action="store_true", help="rank 32 on all layers and the output head")
    parser.add_argument("--no-program", action="store_true", help="without the compiled program")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    rows.add_flag(parser)
    args = parser.parse_args()
    if not os.environ.keys() >= WORKER.keys():  # read by the C library when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**WORKER, **os.environ})
    torch.set_num_threads(args.threads)
    spec = RunSpec(RunId("bench"), "bench", 32) if args.defaults else SPEC
    layout = make_layout(spec)
    print(
        f"{args.runs} runs of {layout.num_params / 1e6:.3f} million parameters in {2 * len(layout.places)} tensors, "
        f"{args.threads} thread(s); ms for all runs, median of {args.repeats}\n\n"
        "| | torch.optim.AdamW(foreach=True) each | ours | ratio |\n|---|---|---|---|"
    )
    for clip in (1.0, 0.0):
        what = "step, clipped by each run's global norm" if clip else "step"
        ratio = compare(spec, args, clip, what)
        case = f"{args.runs} runs" + (", SDK's defaults" if args.defaults else "")
        name = f"optimizer {what}, {case}: ours / AdamW(foreach=True) each, {args.threads} threads"
        rows.save(args.rows, [rows.Row(name, ratio, "x", "" if args.defaults else ">= 6", args.repeats)])


def compare(spec: RunSpec, args: argparse.Namespace, clip: float, what: str) -> float:
    layout = make_layout(spec)
    params = [AdamParams(1e-4 * (1 + i % 7), weight_decay=0.01, grad_clip_norm=clip) for i in range(args.runs)]
    slots = [RunSlot.fresh(replace(spec, seed=i), layout, CPU) for i in range(args.runs)]
    gradients = [torch.randn(layout.num_params, generator=torch.Generator().manual_seed(i)) for i in range(args.runs)]
    peers = [make_peer(layout, slot, own, grad) for slot, own, grad in zip(slots, params, gradients, strict=True)]

    steps = optim_steps_for(CPU, may_compile=not args.no_program)

    def ours() -> None:
        steps(slots, params)

    def peer() -> None:
        for tensors, optimizer in peers:
            if clip:
                torch.nn.utils.clip_grad_norm_(tensors, clip, foreach=True)
            optimizer.step()

    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(args.repeats + 1):
        for slot, (tensors, _), grad in zip(slots, peers, gradients, strict=True):
            slot.rows["grad"] = grad.clone()
            for tensor, fresh in zip(tensors, flat_views(layout, grad), strict=True):
                tensor.grad.copy_(fresh)
        for name, arm in (("ours", ours), ("peer", peer)):
            seconds = timed(arm)
            if repeat:
                times[name].append(seconds)
    for slot, (tensors, _) in zip(slots, peers, strict=True):
        for own, other in zip(flat_views(layout, slot.rows["param"]), tensors, strict=True):
            torch.testing.assert_close(own, other.detach(), rtol=1e-5, atol=1e-7)
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    print(f"| {what} | {ms['peer']:.0f} | {ms['ours']:.0f} | {ms['peer'] / ms['ours']:.1f} |", flush=True)
    return ms["peer"] / ms["ours"]


def make_layout(spec: RunSpec) -> RowLayout:
    linears = [
        LinearInfo(path := f"model.layers.{layer}.{name}", "attn" if "attn" in name else "mlp", *shape, lead=path)
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    ]
    return RowLayout([*linears, LinearInfo(HEAD, "unembed", HIDDEN, VOCAB, HEAD)], spec.targets, spec.rank)


def make_peer(layout: RowLayout, slot: RunSlot, params: AdamParams, grad: torch.Tensor) -> tuple[Any, Any]:
    tensors = [torch.nn.Parameter(view.clone()) for view in flat_views(layout, slot.rows["param"])]
    for tensor, own in zip(tensors, flat_views(layout, grad), strict=True):
        tensor.grad = own.clone()
    optimizer = torch.optim.AdamW(
        tensors, lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=params.eps,
        weight_decay=params.weight_decay, foreach=True,
    )  # fmt: skip
    return tensors, optimizer


def flat_views(layout: RowLayout, row_P: torch.Tensor) -> list[torch.Tensor]:
    return [view for place in layout.places.values() for view in place.views(row_P)]


def timed(arm: Callable[[], object]) -> float:
    started = time.perf_counter()
    arm()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
