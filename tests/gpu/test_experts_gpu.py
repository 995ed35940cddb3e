"""Experts on the GPU: float32 against the CPU, and in bfloat16 the kernels against the plain loop over the same routes.

Between dtypes a token may go to another expert, so bfloat16 isn't held to float32 closely.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.kernels.lab import DEVICE
from tests.numerics.lab import datum, grads, item, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, mixed_states, prompt, run_all, sample, state_of
from tinsmith.model import BaseModel, load_base
from tinsmith.model.lora import LoopLora
from tinsmith.types import BaseInfo, Datum

VOCAB = 1000
RUNS = (spec("a", 8), spec("b", 16, seed=2))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> BaseInfo:
    path = tmp_path_factory.mktemp("gpu_experts")
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=256, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(7)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return BaseInfo("gpu", str(path), "qwen3_moe", VOCAB, 2048, ())


def gradients(base: BaseModel) -> tuple[list[np.ndarray], np.ndarray]:
    """Log-probabilities, and all gradients of both runs."""
    trainer = make_trainer(base, deterministic=False)
    for run in RUNS:
        trainer.import_run(run, state_of(base, run, spread=0.02))
    rng = np.random.default_rng(0)
    items = [item(run.run_id, [datum(rng, n, vocab=VOCAB) for n in (9, 40, 300)]) for run in RUNS]
    results = run_pass(trainer, items)
    found = [grads(trainer, run.run_id) for run in RUNS]
    whole = np.concatenate([of_run[name].ravel() for of_run in found for name in sorted(of_run)])
    return [lp for result in results for lp in result.logprobs], whole


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_float32_is_that_of_the_cpu(info: BaseInfo):
    ours, theirs = (gradients(load_base(info, device=each, dtype=torch.float32)) for each in (DEVICE, CPU))
    for one, other in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)
    assert relative(ours[1], theirs[1]) < 1e-3


def test_bfloat16_by_kernels_is_that_of_the_loop(info: BaseInfo, monkeypatch: pytest.MonkeyPatch):
    base = load_base(info, device=DEVICE, dtype=torch.bfloat16)
    logprobs, by_kernels = gradients(base)
    monkeypatch.setattr(base, "lora", LoopLora)
    expected, by_loop = gradients(base)
    assert np.mean([np.abs(one - other).mean() for one, other in zip(logprobs, expected, strict=True)]) < 2e-2
    assert relative(by_kernels, by_loop) < 1e-1


def test_samples_are_near_the_trainer(info: BaseInfo):
    base = load_base(info, device=DEVICE, dtype=torch.bfloat16)
    state = state_of(base, RUNS[0], spread=0.02)
    trainer = make_trainer(base, deterministic=False)
    trainer.import_run(RUNS[0], state)
    request = sample("r", prompt(1, 60, VOCAB), "a", max_tokens=40)
    (result,) = run_all(make_sampler(base, {"a": state}), [request]).values()
    tokens = np.concatenate([request.prompt, result.sequences[0].tokens])
    whole = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
    (forward,) = run_pass(trainer, [item("a", [whole], backward=False)])
    assert np.abs(forward.logprobs[0][59:] - result.sequences[0].logprobs).mean() < 5e-2


def test_graphs_give_what_plain_steps_give(info: BaseInfo):
    """Adapters in experts and elsewhere, by the slots' kernels and by those of eager steps. Tokens may part where two
    are as likely to within rounding, or where a router tips; log-probabilities are compared as far as they agree."""
    base = load_base(info, device=DEVICE, dtype=torch.bfloat16)
    states = mixed_states(base, 8)
    items = [
        sample(f"r{i}", prompt(i, 5 + 7 * i, VOCAB), None if i % 5 == 4 else f"a{i % 8}", seed=i, max_tokens=8 + i)
        for i in range(20)
    ]
    plain, recorded = (make_sampler(base, states, cuda_graphs=mode) for mode in ("off", "on"))
    expected, found = run_all(plain, items), run_all(recorded, items)
    differences = []
    for name, result in found.items():
        one, other = result.sequences[0], expected[name].sequences[0]
        same = int(np.cumprod(one.tokens == other.tokens).sum())
        differences.append(np.abs(one.logprobs[:same] - other.logprobs[:same]))
    together = np.concatenate(differences)
    assert len(together) > sum(len(result.sequences[0].tokens) for result in found.values()) / 2
    assert together.mean() < 2e-2
    kept = recorded._walker.graphs
    assert kept is not None
    assert kept.num_captured >= 3
