"""Whole training passes through the GPU's parts, in float32 against peft: LoRA, head, losses and optimizer steps.

Attention is that of the machine. What runs on a GPU alone is in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kernels.lab import DEVICE
from tests.numerics.lab import PeftTwin, datum, grads, item, make_base, make_trainer, relative, run_pass, spec
from tinsmith.lora_options import LoraOptions
from tinsmith.model import load_base
from tinsmith.model.lora import LoraBackend, SegmentsLora
from tinsmith.model.lora.triton_lora import TritonLora
from tinsmith.training import Trainer
from tinsmith.training.batched_head import BatchedChunk
from tinsmith.training.head import Head
from tinsmith.training.logit_kernels import FusedLogits
from tinsmith.training.logits import LogitOps, PlainLogits
from tinsmith.types import Failure, Targets

RUNS = (spec("a", 8), spec("b", 3, Targets(attn=True, mlp=False, unembed=False), seed=2), spec("c", 16, seed=3))
DROPPING = replace(spec("d", 8, seed=4), options=LoraOptions(dropout=0.3, ranks=(("k_proj", 3),)))
BOUND = 1e-5 if DEVICE.type == "cpu" else 1e-4


def trainer_with(base, lora: LoraBackend, ops: LogitOps, chunk_tokens: int = 64) -> Trainer:
    base.lora = lora
    trainer = make_trainer(base, *RUNS, DROPPING)
    trainer._head = Head(
        base.head,
        base.final,
        chunk_tokens,
        deterministic=False,
        make_pass=partial(BatchedChunk, base.head, base.final, lora, ops),
    )
    return trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    info = make_base("qwen3", Path(tmp_path_factory.mktemp("base"))).info
    return load_base(info, device=DEVICE, dtype=torch.float32)


def plain_trainer(base) -> Trainer:
    base.lora = SegmentsLora
    trainer = make_trainer(base, *RUNS, DROPPING)
    trainer._head = Head(base.head, base.final, 64, deterministic=False)
    return trainer


def test_against_peft(base):
    rng = np.random.default_rng(0)
    trainer = trainer_with(base, TritonLora, FusedLogits())
    items = [item(run.run_id, [datum(rng, n) for n in (7, 40)]) for run in RUNS]
    results = run_pass(trainer, items)
    for run, one, result in zip(RUNS, items, results, strict=True):
        twin = PeftTwin(base, trainer.export_run(run.run_id))
        total, logprobs = twin.backward(one.data)
        assert result.metrics["loss:sum"] == pytest.approx(total, rel=BOUND, abs=1e-3)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2 * BOUND)
        errors = {name: relative(grads(trainer, run.run_id)[f"grad/{name}"], p.grad) for name, p in twin.params.items()}
        assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("loss", ["gspo", "ppo"])
def test_like_the_cpu(base, loss: str):
    """In order; sequences longer than a chunk, the losses of whole sequences included."""
    rng = np.random.default_rng(1)
    items = [item(run.run_id, [datum(rng, n, loss) for n in (40, 9)], loss=loss) for run in (*RUNS, DROPPING)]
    trainer = trainer_with(base, partial(TritonLora, is_ordered=True), PlainLogits(), chunk_tokens=32)
    ours = run_pass(trainer, items)
    plain = plain_trainer(base)
    for got, want in zip(ours, run_pass(plain, items), strict=True):
        assert got.metrics["loss:sum"] == pytest.approx(want.metrics["loss:sum"], rel=1e-5, abs=1e-3)
    for run in (*RUNS, DROPPING):
        assert_close(grads(trainer, run.run_id), grads(plain, run.run_id))


def test_many_targets_and_a_failure_beside_them(base):
    """Data with four targets a position share chunks with others; one request isn't finite and fails alone."""
    rng = np.random.default_rng(3)
    trainer = trainer_with(base, TritonLora, FusedLogits(), chunk_tokens=32)
    bad = datum(rng, 20)
    bad.inputs["weights"][4] = np.inf
    items = [
        item("a", [datum(rng, 40, num_targets=4), datum(rng, 11)], seq=1),
        item("a", [bad, datum(rng, 9)], seq=2),
        item("c", [datum(rng, 50)], seq=1, backward=False),
        item("c", [datum(rng, 50)], seq=2),
    ]
    ours = run_pass(trainer, items)
    plain = plain_trainer(base)
    theirs = run_pass(plain, items)
    for got, want in zip(ours, theirs, strict=True):
        if isinstance(want, Failure):
            assert got == want
            continue
        assert got.metrics["loss:sum"] == pytest.approx(want.metrics["loss:sum"], rel=1e-5, abs=1e-4)
        for one, other in zip(got.logprobs, want.logprobs, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=BOUND)
    for run in ("a", "c"):
        assert_close(grads(trainer, run), grads(plain, run))


def assert_close(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    for name, expected in theirs.items():
        assert np.linalg.norm(ours[name] - expected) <= BOUND * np.linalg.norm(expected), name
