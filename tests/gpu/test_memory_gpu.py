"""The budget, running out of memory and activation checkpointing on a GPU, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.numerics.lab import datum, grads, item, make_trainer, run_pass, spec
from tinsmith.config import Settings
from tinsmith.model import BaseModel, load_base
from tinsmith.training.budget import USEFUL_TOKENS, Budget
from tinsmith.training.footprint import measure
from tinsmith.types import BaseInfo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = torch.device("cuda", 0)
VOCAB = 4000
GIB = 2**30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    path: Path = tmp_path_factory.mktemp("gpu")
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=65_536,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return load_base(BaseInfo("gpu", str(path), "qwen3", VOCAB, 65_536, ()), device=DEVICE, dtype=torch.bfloat16)


@pytest.fixture
def four_gib() -> Iterator[None]:
    """This process gets no more of the device than it has and four GiB."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + 4 * GIB) / total, DEVICE)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_the_budget_is_found(base: BaseModel) -> None:
    footprint = measure(base, 512)
    assert 0 < footprint.recomputed < 0.5 * footprint.kept
    budget = Budget(Settings(), DEVICE)
    budget.start(footprint)
    assert 64 <= budget.tokens <= USEFUL_TOKENS["cuda"]


def test_recomputing_agrees(base: BaseModel) -> None:
    rng = np.random.default_rng(0)
    items = [item("a", [datum(rng, n, vocab=VOCAB) for n in (900, 70)]), item("b", [datum(rng, 333, vocab=VOCAB)])]
    trainers = [make_trainer(base, spec("a", 16, seed=1), spec("b", 8, seed=2)) for _ in range(2)]
    for trainer, mode in zip(trainers, ("never", "always"), strict=True):
        trainer.budget = Budget(Settings(activation_checkpointing=mode), DEVICE)
    kept, recomputed = (run_pass(trainer, items) for trainer in trainers)
    for one, other in zip(kept, recomputed, strict=True):
        for left, right in zip(one.logprobs, other.logprobs, strict=True):
            np.testing.assert_array_equal(left, right)
    for run in ("a", "b"):
        left, right = (grads(trainer, run) for trainer in trainers)
        assert all(np.linalg.norm(left[n] - right[n]) <= 1e-2 * np.linalg.norm(left[n]) for n in left)


@pytest.mark.usefixtures("four_gib")
def test_running_out_makes_packs_smaller(base: BaseModel) -> None:
    rng = np.random.default_rng(0)
    items = [item("a", [datum(rng, 4096, vocab=VOCAB) for _ in range(24)])]
    trainer = make_trainer(base, spec("a", 16))
    with capture_logs() as logs:
        (result,) = run_pass(trainer, items)
    assert any(line["event"].startswith("out of memory") for line in logs)
    assert np.isfinite(result.metrics["loss:sum"])
    assert all(np.isfinite(grad).all() and grad.any() for grad in grads(trainer, "a").values())
