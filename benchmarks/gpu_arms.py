"""What `bench_gpu.py` times: one training pass of many runs, peft's loop over adapters, decoding, optimizer steps."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpu_shapes import Machine
from peft import LoraConfig, get_peft_model

from tinsmith.config import Settings
from tinsmith.model import BaseModel
from tinsmith.sampling import Sampler
from tinsmith.training import Trainer
from tinsmith.types import (
    AdamParams,
    Datum,
    LossSpec,
    OpId,
    OptimItem,
    RunId,
    RunSpec,
    SampleItem,
    SamplingParams,
    Targets,
    TrainItem,
)

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_HEAD = Targets(unembed=False)


def measure(machine: Machine, arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each arm: interleaved, one round to warm up, medians."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            machine.synchronize()
            started = time.perf_counter()
            arm()
            machine.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def datum(rng: np.random.Generator, length: int, vocab: int) -> Datum:
    tokens = rng.integers(0, vocab, length + 1)
    return Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)})


def make_trainer(base: BaseModel, num_runs: int, rank: int, targets: Targets) -> tuple[Trainer, list[RunId]]:
    trainer = Trainer(base, Settings())
    runs = [RunId(f"r{index:03}") for index in range(num_runs)]
    for index, run in enumerate(runs):
        trainer.create_run(RunSpec(run, base.info.name, rank, index, targets))
    return trainer, runs


def training_arm(
    base: BaseModel, lengths: Sequence[Sequence[int]], rank: int, targets: Targets = NO_HEAD
) -> Callable[[], None]:
    """One pass over runs with data of these lengths, in one pack."""
    rng = np.random.default_rng(0)
    trainer, runs = make_trainer(base, len(lengths), rank, targets)
    items = [
        TrainItem(
            OpId(run), run, 1, tuple(datum(rng, n, base.info.vocab_size) for n in own), LossSpec("cross_entropy"), True
        )
        for run, own in zip(runs, lengths, strict=True)
    ]

    def step() -> None:
        training_pass = trainer.start_pass(items)
        while training_pass.advance(10**9):
            pass
        for outcome in training_pass.commit():
            assert hasattr(outcome, "logprobs"), outcome

    return step


def peft_arm(
    machine: Machine, shape: str, lengths: Sequence[Sequence[int]], rank: int, targets: Targets = NO_HEAD
) -> Callable[[], None]:
    """Each adapter in turn, its data as one batch, loss from `labels`."""
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=[*LINEARS, *["lm_head"] * targets.unembed])
    model = get_peft_model(machine.model(shape), config, adapter_name="r000")
    for index in range(1, len(lengths)):
        model.add_adapter(f"r{index:03}", config)
    vocab = model.config.vocab_size
    rng = np.random.default_rng(0)
    batches = [torch.from_numpy(rng.integers(0, vocab, (len(own), own[0]))).to(machine.device) for own in lengths]

    def step() -> None:
        for index, tokens in enumerate(batches):
            model.set_adapter(f"r{index:03}")
            model(input_ids=tokens, labels=tokens).loss.backward()

    return step


class NoText:
    def decode(self, ids: Sequence[int]) -> str:
        return ""


def decode_arm(
    machine: Machine,
    base: BaseModel,
    batch: int,
    num_adapters: int,
    rank: int,
    prompt: int,
    num_tokens: int,
    cuda_graphs: str = "auto",
) -> float:
    """Seconds of a step that advances all sequences by a token: median over the steps without prefill."""
    trainer, runs = make_trainer(base, num_adapters, rank, NO_HEAD)
    kv_mib = 2**15 if machine.device.type == "cuda" else 64
    settings = Settings(kv_cache_mib=kv_mib, resident_adapters_mib=2**15, cuda_graphs=cuda_graphs)
    sampler = Sampler(base, settings, NoText())
    for run in runs:
        sampler.add_adapter(run, trainer.export_run(run, ("param",)))
        trainer.drop_run(run)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=num_tokens, stop_tokens=())
    for index in range(batch):
        tokens = rng.integers(0, base.info.vocab_size, prompt).astype(np.int32)
        sampler.submit(SampleItem(OpId(f"s{index}"), runs[index % num_adapters], tokens, params, 1, index))
    times = []
    while sampler.num_samples:
        started = time.perf_counter()
        sampler.step()
        machine.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[-num_tokens // 2 :])


def optimizer_arms(base: BaseModel, num_runs: int, rank: int) -> dict[str, Callable[[], None]]:
    """A step of all runs, ours and a torch.optim.AdamW(foreach=True) for each."""
    trainer, runs = make_trainer(base, num_runs, rank, NO_HEAD)
    slots = [trainer._slots[run] for run in runs]
    grads = [torch.randn_like(slot.rows["param"]) for slot in slots]
    params = AdamParams(learning_rate=1e-4)
    twins = [
        [torch.nn.Parameter(view.float().clone()) for w in slot.views.values() for view in w.tensors] for slot in slots
    ]
    for own in twins:
        for twin in own:
            twin.grad = torch.randn_like(twin)
    optimizers = [torch.optim.AdamW(own, lr=1e-4, foreach=True) for own in twins]

    def ours() -> None:
        for slot, grad in zip(slots, grads, strict=True):
            slot.rows["grad"] = grad
        trainer.optim_step([OptimItem(OpId(run), run, params) for run in runs])

    def theirs() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return {"ours": ours, "theirs": theirs}


def collect(machine: Machine) -> None:
    """Give back what the last row held."""
    gc.collect()
    machine.free()
