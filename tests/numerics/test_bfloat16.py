"""A base in bfloat16, as GPUs run it, and in float16: against the same weights in float32, and sampler against trainer.

Bounds: gradients within 2e-2 of float32 in relative norm, 5e-3 in float16; log-probabilities of sampler and trainer
within 5e-3 on average, 1e-3 in float16. The weights are saved in bfloat16, so that all bases have the very same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.numerics.lab import CPU, datum, grads, item, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample, state_of
from tinsmith.bases.catalog import describe, parse
from tinsmith.config import Settings
from tinsmith.errors import UnsupportedError
from tinsmith.model import BaseModel, load_base
from tinsmith.model.lora import LoraBackend
from tinsmith.model.lora.grouped import GroupedLora
from tinsmith.model.lora.loop import LoopLora
from tinsmith.torch_engine import TorchEngine
from tinsmith.training import Trainer
from tinsmith.types import AdamParams, BaseInfo, Datum, OpId, OptimItem, RunId, RunSpec, Targets

GRADIENT_BOUND = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
VOCAB = 4000
LOGPROB_BOUND = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
RUNS = (spec("a", 8), spec("b", 16, Targets(attn=True, mlp=True, unembed=False), seed=2), spec("c", 4, seed=3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, BaseModel]:
    path = tmp_path_factory.mktemp("bf16")
    return {dtype: make_base(path, dtype) for dtype in DTYPES}


def make_base(path: Path, dtype: torch.dtype) -> BaseModel:
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(7)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    info = BaseInfo("bf16", str(path), "qwen3", config.vocab_size, config.max_position_embeddings, ())
    return load_base(info, device=CPU, dtype=dtype)


def new_trainer(base: BaseModel) -> Trainer:
    """With runs that have moved a little from where they start."""
    trainer = make_trainer(base)
    for run in RUNS:
        trainer.import_run(run, state_of(base, run, spread=0.02))
    return trainer


def one_pass(base: BaseModel, loss: str) -> tuple[Trainer, list[object]]:
    rng = np.random.default_rng(0)
    trainer = new_trainer(base)
    items = [
        item(run.run_id, [datum(rng, n, loss, vocab=base.info.vocab_size) for n in (9, 40, 66)], loss=loss)
        for run in RUNS
    ]
    return trainer, run_pass(trainer, items)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, LoopLora), (torch.bfloat16, GroupedLora), (torch.float16, LoopLora)]
)
@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "gspo"])
def test_like_float32(bases: dict[torch.dtype, BaseModel], loss: str, dtype: torch.dtype, backend: LoraBackend):
    exact, _ = one_pass(bases[torch.float32], loss)
    base = bases[dtype]
    before, base.lora = base.lora, backend
    trainer, results = one_pass(base, loss)
    base.lora = before
    assert not [result for result in results if not hasattr(result, "logprobs")]
    for run in RUNS:
        ours, theirs = grads(trainer, run.run_id), grads(exact, run.run_id)
        whole = (np.concatenate([side[name].ravel() for name in sorted(theirs)]) for side in (ours, theirs))
        assert relative(*whole) < GRADIENT_BOUND[dtype], run.run_id


def test_a_step_moves_what_passes_compute_with(bases: dict[torch.dtype, BaseModel]):
    trainer, _ = one_pass(bases[torch.bfloat16], "cross_entropy")
    rng = np.random.default_rng(1)
    asked = [item("a", [datum(rng, 30, vocab=VOCAB)], backward=False)]
    (before,) = run_pass(trainer, asked)
    trainer.optim_step([OptimItem(OpId("o"), RunId("a"), AdamParams(learning_rate=1e-2))])
    (after,) = run_pass(trainer, asked)
    assert np.abs(before.logprobs[0] - after.logprobs[0]).max() > 1e-3


@pytest.mark.parametrize("dtype", HALVES)
def test_sampled_logprobs_are_those_of_the_trainer(bases: dict[torch.dtype, BaseModel], dtype: torch.dtype):
    base = bases[dtype]
    states = {f"run{i}": state_of(base, spec(f"run{i}", 8, seed=i + 1)) for i in range(2)}
    trainer = make_trainer(base)
    for state in states.values():
        trainer.import_run(state.spec, state)
    items = [
        sample(f"r{i}", prompt(i, 20 + 9 * i, VOCAB), f"run{i % 2}", seed=i, max_tokens=40, prompt_logprobs=True)
        for i in range(4)
    ]
    results = run_all(make_sampler(base, states), items)
    data = []
    for request in items:
        tokens = np.concatenate([request.prompt, results[request.op_id].sequences[0].tokens])
        data.append(Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)}))
    forwards = [item(f"run{i % 2}", [d], seq=i, backward=False) for i, d in enumerate(data)]
    gaps = []
    for request, forward in zip(items, run_pass(trainer, forwards), strict=True):
        sampled = np.asarray(results[request.op_id].sequences[0].logprobs)
        gaps.append(np.abs(forward.logprobs[0][len(request.prompt) - 1 :] - sampled))
    assert np.concatenate(gaps).mean() < LOGPROB_BOUND[dtype]


def test_a_datum_that_fails_leaves_its_neighbours_alone(bases: dict[torch.dtype, BaseModel]):
    """Not finite inputs of one request of run a: its other request and run b are as they are without it."""
    rng = np.random.default_rng(5)
    good, other = [datum(rng, 40, vocab=VOCAB)], [datum(rng, 50, vocab=VOCAB)]
    bad = datum(rng, 30, vocab=VOCAB)
    bad.inputs["weights"][3] = np.inf
    found = []
    for with_bad in (False, True):
        trainer = new_trainer(bases[torch.bfloat16])
        items = [item("a", good, seq=1), item("a", [bad], seq=2), item("b", other)]
        results = run_pass(trainer, items if with_bad else [items[0], items[2]])
        found.append((results[0], results[-1], grads(trainer, "a"), grads(trainer, "b")))
        if with_bad:
            assert results[1].code == "non_finite_loss"
    for alone, crowded in zip(found[0][2:], found[1][2:], strict=True):
        for name in alone:
            assert relative(crowded[name], alone[name]) < 1e-2
    for alone, crowded in zip(found[0][:2], found[1][:2], strict=True):
        np.testing.assert_allclose(crowded.logprobs[0], alone.logprobs[0], atol=2e-2)


def test_the_engine_serves_in_bfloat16_if_told_to():
    """The shipped model, trained and sampled through the engine."""
    info = describe(parse("tinsmith/tiny"))
    engine = TorchEngine(info, Settings(device="cpu", dtype="bfloat16", threads=1))
    run = RunSpec(RunId("a"), info.name, 8, 1)
    engine.create_run(run)
    rng = np.random.default_rng(6)
    for _ in range(2):
        training_pass = engine.start_pass([item("a", [datum(rng, 40, vocab=256)])])
        while training_pass.advance(10**6) is not None:
            pass
        (result,) = training_pass.commit()
        assert np.isfinite(result.metrics["loss:sum"])
        (step,) = engine.optim_step([OptimItem(OpId("o"), RunId("a"), AdamParams(learning_rate=1e-2))])
        assert step.metrics["grad_norm"] > 0
    engine.add_adapter("k", engine.export_run(RunId("a"), ("param",)))
    engine.submit_sample(sample("s", prompt(1, 12, 256), "k", seed=1, max_tokens=5))
    done = []
    while not done:
        done = engine.step_samples()
    assert len(done[0][1].sequences[0].tokens) == 5


def test_activations_beyond_float16_are_refused_at_the_start(tmp_path: Path):
    """As those of models that were trained in bfloat16 may be; bfloat16 has them."""
    make_base(tmp_path, torch.float32)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("down_proj.weight"):
            tensors[name] *= 1e6
    save_file(tensors, file, {"format": "pt"})
    info = BaseInfo("bf16", str(tmp_path), "qwen3", VOCAB, 512, ())
    load_base(info, device=CPU, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="not finite in float16: start with --dtype bfloat16"):
        load_base(info, device=CPU, dtype=torch.float16)


def test_deterministic_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UnsupportedError, match="--deterministic is kept on the CPU alone"):
        TorchEngine(describe(parse("tinsmith/tiny")), Settings(device="cuda", deterministic=True, threads=1))
