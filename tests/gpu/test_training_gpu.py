"""A base on the GPU in bfloat16, whole passes: against the CPU in float32, the sampler, and each run alone.

Bounds: gradients within 2e-2 of float32 in relative norm; log-probabilities of sampler and trainer within 5e-3 on
average. The weights are saved in bfloat16, so that both sides have the very same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.kernels.lab import DEVICE
from tests.numerics.lab import datum, grads, item, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample, state_of
from tinsmith.model import BaseModel, load_base
from tinsmith.model.lora import LoraBackend
from tinsmith.model.lora.grouped import GroupedLora
from tinsmith.model.lora.loop import LoopLora
from tinsmith.model.lora.triton_lora import TritonLora
from tinsmith.training import Trainer
from tinsmith.types import AdamParams, BaseInfo, Datum, OpId, OptimItem, RunId, RunSpec, Targets

VOCAB = 4000
GRADIENT_BOUND = 2e-2
LOGPROB_BOUND = 5e-3
RUNS = (spec("a", 8), spec("b", 16, Targets(attn=True, mlp=True, unembed=False), seed=2), spec("c", 32, seed=3))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> BaseInfo:
    path = tmp_path_factory.mktemp("gpu_base")
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(7)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return BaseInfo("gpu", str(path), "qwen3", VOCAB, 4096, ())


@pytest.fixture(scope="module")
def on_gpu(info: BaseInfo) -> BaseModel:
    """Loaded straight to the device."""
    base = load_base(info, device=DEVICE, dtype=torch.bfloat16)
    assert base.device.type == DEVICE.type
    assert Path(info.path).exists()
    return base


@pytest.fixture(scope="module")
def on_cpu(info: BaseInfo) -> BaseModel:
    return load_base(info, device=CPU, dtype=torch.float32)


def new_trainer(base: BaseModel, runs: tuple[RunSpec, ...] = RUNS) -> Trainer:
    trainer = make_trainer(base)
    for run in runs:
        trainer.import_run(run, state_of(base, run, spread=0.02))
    return trainer


def whole(trainer: Trainer, run: str) -> np.ndarray:
    found = grads(trainer, run)
    return np.concatenate([found[name].ravel() for name in sorted(found)])


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("backend", [TritonLora, GroupedLora, LoopLora])
@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "gspo"])
def test_like_float32_on_the_cpu(
    on_gpu: BaseModel, on_cpu: BaseModel, loss: str, backend: LoraBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(on_gpu, "lora", backend)
    trainers = [new_trainer(on_gpu), new_trainer(on_cpu)]
    results = []
    for trainer in trainers:
        rng = np.random.default_rng(0)
        data = [item(r.run_id, [datum(rng, n, loss, vocab=VOCAB) for n in (9, 40, 300)], loss=loss) for r in RUNS]
        results.append(run_pass(trainer, data))
    for run, ours, theirs in zip(RUNS, *results, strict=True):
        gaps = [np.abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)]
        assert np.concatenate(gaps).mean() < 2e-2
        assert relative(*(whole(trainer, run.run_id) for trainer in trainers)) < GRADIENT_BOUND, run.run_id


def test_64_ragged_runs_have_the_gradients_of_each_alone(on_gpu: BaseModel):
    runs = tuple(spec(f"r{i}", (4, 8, 16, 32)[i % 4], seed=i + 1) for i in range(64))
    rng = np.random.default_rng(2)
    items = [
        item(run.run_id, [datum(rng, int(n), vocab=VOCAB)])
        for run, n in zip(runs, rng.integers(32, 65, 64), strict=True)
    ]
    together = new_trainer(on_gpu, runs)
    results = run_pass(together, items)
    assert results[0].metrics["pass_runs:max"] == 64
    for run, one, crowded in list(zip(runs, items, results, strict=True))[::7]:
        alone = new_trainer(on_gpu, (run,))
        (result,) = run_pass(alone, [one])
        assert np.abs(result.logprobs[0] - crowded.logprobs[0]).mean() < LOGPROB_BOUND
        assert relative(whole(together, run.run_id), whole(alone, run.run_id)) < GRADIENT_BOUND


def test_sampled_logprobs_are_those_of_the_trainer(on_gpu: BaseModel):
    states = {f"run{i}": state_of(on_gpu, spec(f"run{i}", 8, seed=i + 1)) for i in range(4)}
    trainer = make_trainer(on_gpu)
    for state in states.values():
        trainer.import_run(state.spec, state)
    items = [
        sample(f"r{i}", prompt(i, 20 + 9 * i, VOCAB), f"run{i % 4}", seed=i, max_tokens=60, prompt_logprobs=True)
        for i in range(8)
    ]
    results = run_all(make_sampler(on_gpu, states), items)
    data = []
    for request in items:
        tokens = np.concatenate([request.prompt, results[request.op_id].sequences[0].tokens])
        data.append(Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)}))
    forwards = [item(f"run{i % 4}", [d], seq=i, backward=False) for i, d in enumerate(data)]
    gaps = []
    for request, forward in zip(items, run_pass(trainer, forwards), strict=True):
        sampled = np.asarray(results[request.op_id].sequences[0].logprobs)
        gaps.append(np.abs(forward.logprobs[0][len(request.prompt) - 1 :] - sampled))
    assert np.concatenate(gaps).mean() < LOGPROB_BOUND


def test_steps_follow_the_cpu(on_gpu: BaseModel, on_cpu: BaseModel):
    """Three steps with clipping and decay; parameters stay within what bfloat16 gradients allow."""
    params = AdamParams(learning_rate=1e-3, eps=1e-4, weight_decay=0.1, grad_clip_norm=1.0)
    ends = []
    for base in (on_gpu, on_cpu):
        trainer = new_trainer(base)
        rng = np.random.default_rng(4)
        for _ in range(3):
            run_pass(trainer, [item(run.run_id, [datum(rng, 60, vocab=VOCAB)]) for run in RUNS])
            outcomes = trainer.optim_step([OptimItem(OpId("o"), run.run_id, params) for run in RUNS])
        tensors = trainer.export_run(RunId("a"), ("param",)).tensors
        ends.append((outcomes[0].metrics["grad_norm"], np.concatenate([t.ravel() for t in tensors.values()])))
    (norm, ours), (expected_norm, theirs) = ends
    assert norm == pytest.approx(expected_norm, rel=5e-2)
    assert relative(ours, theirs) < 1e-2


def test_what_fails_leaves_its_neighbours_alone(on_gpu: BaseModel):
    rng = np.random.default_rng(5)
    bad = datum(rng, 30, vocab=VOCAB)
    bad.inputs["weights"][3] = np.inf
    good, other = [datum(rng, 40, vocab=VOCAB)], [datum(rng, 50, vocab=VOCAB)]
    with_bad, without = new_trainer(on_gpu), new_trainer(on_gpu)
    items = [item("a", good, seq=1), item("a", [bad], seq=2), item("c", other)]
    results = run_pass(with_bad, items)
    assert results[1].code == "non_finite_loss"
    run_pass(without, [items[0], items[2]])
    for run in ("a", "c"):
        assert relative(whole(with_bad, run), whole(without, run)) < GRADIENT_BOUND
