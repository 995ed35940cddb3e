"""Every family in bfloat16, as GPUs serve it, and in float16: against the same weights in float32.

The weights are stored in bfloat16, so that all bases have the very same. Loading checks the opened model against the
untouched one in that dtype, as at a server's start. Mixtures take routes that are given, or those that were sampled:
rounding tips choices, and another expert is another number.

Bounds: gradients in relative norm, log-probabilities of sampler and trainer on average. They are wider than those of
`tests/numerics/test_bfloat16.py`, since models of 64 numbers a row average less. `SENSITIVE` magnify rounding by what
they are made of: gpt-oss (gradients of transformers' own in bfloat16 are as far from float32), long states, LongRoPE,
projections that are clamped (OLMo 1).
The default suite tries every family in bfloat16 and a few in float16.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.families.configs import CONFIGS, PROCESSORS, VOCAB
from tests.families.gallery import SIZES, seeing
from tests.families.test_replay import other_routes
from tests.numerics.lab import datum, grads, item, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample, state_of
from tinsmith.model import BaseModel
from tinsmith.types import Datum, Targets, TrainResult

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
GRADIENT_BOUND = {torch.bfloat16: 5e-2, torch.float16: 6e-3}
LOGPROB_BOUND = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
SENSITIVE = {"gpt_oss": 4.0, "qwen3_5": 2.0, "qwen3_5_moe": 2.0, "qwen3_next": 2.0, "phi4_mini_long": 2.0, "olmo": 2.0}
"""How many times the bound of gradients is theirs."""
IS_ALL = bool(os.environ.get("TINSMITH_TEST_ALL_FORMS"))  # `make forms`
IN_FLOAT16 = (
    tuple(CONFIGS) if IS_ALL else ("llama", "gemma2", "gpt_oss", "deepseek_v3", "llama4", "qwen3_next", "qwen3_vl")
)
KINDS = [*(f"{kind}-bfloat16" for kind in CONFIGS), *(f"{kind}-float16" for kind in IN_FLOAT16)]
SEEING = [name for name in KINDS if name.partition("-")[0] in PROCESSORS]
RUNS = (spec("a", 8), spec("b", 3, Targets(attn=True, mlp=False, unembed=False), seed=2))
SEER = (spec("a", 8, Targets(vision=True)), spec("b", 3, seed=2))
MakeBase = Callable[..., BaseModel]
Half = tuple[BaseModel, BaseModel]  # in float32, and in the dtype that is tried


@pytest.fixture(autouse=True)
def exact_reference() -> None:
    """transformers as it is: the check at the start has nothing else."""


@pytest.fixture(params=KINDS)
def half(request: pytest.FixtureRequest, make_base: MakeBase) -> Half:
    return load(make_base, request.param)


@pytest.fixture(params=SEEING)
def eye(request: pytest.FixtureRequest, make_base: MakeBase) -> Half:
    return load(make_base, request.param)


def load(make_base: MakeBase, name: str) -> Half:
    kind, _, half = name.partition("-")
    return tuple(make_base(kind, dtype=dtype, stored=torch.bfloat16) for dtype in (torch.float32, HALVES[half]))


def gradients(base: BaseModel, runs: Any, data: Callable[..., list[Datum]]) -> dict[str, np.ndarray]:
    """Of each run, end to end, from one pass."""
    trainer = make_trainer(base, *runs, deterministic=False)
    results = run_pass(trainer, [item(run.run_id, data(base, number)) for number, run in enumerate(runs)])
    assert all(isinstance(result, TrainResult) for result in results), results
    found = {run.run_id: grads(trainer, run.run_id) for run in runs}
    return {run: np.concatenate([own[name].ravel() for name in sorted(own)]) for run, own in found.items()}


def name_of(base: BaseModel) -> str:
    """Of its dtype."""
    return str(base.dtype).removeprefix("torch.")


def compare(half: Half, runs: Any, data: Callable[..., list[Datum]], record: Callable[..., None]) -> None:
    exact, base = half
    theirs = gradients(exact, runs, data)
    for run, ours in gradients(base, runs, data).items():
        assert np.isfinite(ours).all()
        difference = float(np.linalg.norm(ours - theirs[run]) / np.linalg.norm(theirs[run]))
        record(f"gradients in {name_of(base)}", difference)
        assert difference < GRADIENT_BOUND[base.dtype] * SENSITIVE.get(base.info.name, 1.0), run


def words(base: BaseModel, seed: int) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return routed(base, seed, [datum(rng, length) for length in (7, 40, 66)])


def pictures(base: BaseModel, seed: int) -> list[Datum]:
    return routed(base, seed, [seeing(base, seed, SIZES[:2], 16), seeing(base, seed + 50, SIZES[:1], 6)])


def routed(base: BaseModel, seed: int, data: list[Datum]) -> list[Datum]:
    if not base.num_routers:
        return data
    return [replace(each, routes=other_routes(base, each.num_tokens, seed)) for each in data]


def test_gradients_are_near_those_of_float32(half: Half, record_property: Any) -> None:
    compare(half, RUNS, words, record_property)


def test_gradients_of_a_tower_are_near_those_of_float32(eye: Half, record_property: Any) -> None:
    """With pictures, beside a run without adapters there."""
    compare(eye, SEER, pictures, record_property)


def test_the_sampler_is_near_the_trainer(half: Half, record_property: Any) -> None:
    base = half[1]
    states = {run.run_id: state_of(base, run) for run in RUNS}
    asked = [
        replace(sample(f"r{i}", prompt(i, 5 + 17 * i, VOCAB), "ab"[i % 2], seed=i, max_tokens=24), records_routes=True)
        for i in range(3)
    ]
    results = run_all(make_sampler(base, states, prefill_chunk_tokens=16), asked)
    trainer = make_trainer(base, deterministic=False)
    for state in states.values():
        trainer.import_run(state.spec, state)
    gaps = []
    for one in asked:
        result = results[one.op_id]
        tokens = np.concatenate([one.prompt, result.sequences[0].tokens])
        whole = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
        if base.num_routers:
            whole = replace(whole, routes=np.concatenate([result.routes.prompt, result.routes.sequences[0]]))
        (forward,) = run_pass(trainer, [item(one.adapter, [whole], backward=False)])
        gaps.append(np.abs(forward.logprobs[0][len(one.prompt) - 1 :] - result.sequences[0].logprobs))
    difference = float(np.concatenate(gaps).mean())
    record_property(f"sampler from trainer in {name_of(base)}", difference)
    assert difference < LOGPROB_BOUND[base.dtype]
