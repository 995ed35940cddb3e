"""Decoding on a GPU: CUDA graphs against plain steps, captures that fail, and blocks that are shared.

Tokens may part where two are as likely to within rounding, so log-probabilities are compared as far as tokens agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.kernels.lab import DEVICE
from tests.numerics.sampling_lab import Letters, mixed_states, prompt, run_all, sample
from tinsmith.config import Settings
from tinsmith.model import BaseModel, load_base
from tinsmith.sampling import Sampler
from tinsmith.sampling.graphs import DecodeGraphs
from tinsmith.sampling.lora import DecodeLora
from tinsmith.sampling.static_step import StaticStep
from tinsmith.sampling.tiled_lora import TiledLora
from tinsmith.types import BaseInfo, SampleItem, SampleResult

VOCAB = 4000
LOGPROB_BOUND = 5e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    path: Path = tmp_path_factory.mktemp("gpu_sampling")
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(7)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return load_base(BaseInfo("gpu", str(path), "qwen3", VOCAB, 4096, ()), device=DEVICE, dtype=torch.bfloat16)


def sampler_of(base: BaseModel, num_adapters: int = 8, **settings: Any) -> Sampler:
    sampler = Sampler(base, Settings(**settings), Letters())
    for key, state in mixed_states(base, num_adapters).items():
        sampler.add_adapter(key, state)
    return sampler


def requests(count: int) -> list[SampleItem]:
    return [
        sample(
            f"r{i}", prompt(i, (1, 20, 63, 64, 300)[i % 5], VOCAB), None if i % 6 == 5 else f"a{i % 8}",
            num_samples=1 + i % 2, seed=i, max_tokens=20 + 7 * (i % 9),
        )
        for i in range(count)
    ]  # fmt: skip


def assert_near(found: dict[str, SampleResult], expected: dict[str, SampleResult]) -> None:
    gaps = []
    for name, result in found.items():
        for one, other in zip(result.sequences, expected[name].sequences, strict=True):
            assert np.isfinite(one.logprobs).all()
            differ = np.flatnonzero(one.tokens != other.tokens)
            agreed = int(differ[0]) if len(differ) else len(one.tokens)
            gaps.append(np.abs(one.logprobs[:agreed] - other.logprobs[:agreed]))
    together = np.concatenate(gaps)
    assert len(together) > 0.5 * sum(len(s.tokens) for r in found.values() for s in r.sequences)
    assert together.mean() < LOGPROB_BOUND


def graphs_of(sampler: Sampler) -> DecodeGraphs:
    found = sampler._walker.graphs
    assert found is not None
    return found


def test_graphs_are_on_and_give_what_plain_steps_give(base: BaseModel) -> None:
    """Batches of many sizes and all ranks, twice: the second time everything is replayed."""
    plain, with_graphs = sampler_of(base, cuda_graphs="off"), sampler_of(base, cuda_graphs="on")
    assert plain._walker.graphs is None
    for _ in range(2):
        items = requests(40)
        assert_near(run_all(with_graphs, items), run_all(plain, items))
    kept = graphs_of(with_graphs)
    assert len(kept) == kept.num_captured >= 5
    assert kept.num_bytes < 2**30


def test_a_failed_capture_goes_on_without_graphs(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA itself refuses a step that waits for the device; what follows is right."""
    compute = StaticStep.compute

    def waiting(self: StaticStep, bucket: int) -> None:
        compute(self, bucket)
        self.hidden_ND.sum().item()

    items = requests(10)
    expected = run_all(sampler_of(base, cuda_graphs="off"), items)
    sampler = sampler_of(base)
    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(StaticStep, "compute", waiting)
        found = run_all(sampler, items)
    assert_near(found, expected)
    assert [line["log_level"] for line in logs if "without CUDA graphs" in line["event"]] == ["warning"]
    assert graphs_of(sampler).num_captured == 0


def test_adapters_in_tiles_are_those_of_stacks(base: BaseModel) -> None:
    items = requests(24)
    tiled = sampler_of(base, cuda_graphs="off")
    assert isinstance(tiled._walker.decoder._lora, TiledLora)
    stacked = sampler_of(base, cuda_graphs="off")
    stacked._walker.decoder._lora = DecodeLora(DEVICE, is_exact=False)
    assert_near(run_all(tiled, items), run_all(stacked, items))


def test_beginnings_and_groups_share_blocks(base: BaseModel) -> None:
    sampler = sampler_of(base)
    stem = prompt(1, 500, VOCAB)
    first = run_all(sampler, [sample("first", stem, "a0", seed=1, max_tokens=80)])["first"]
    longer = np.concatenate([stem, first.sequences[0].tokens, prompt(2, 30, VOCAB)])
    item = sample("second", longer, "a0", num_samples=8, seed=2, max_tokens=60)
    found = run_all(sampler, [item])
    assert found["second"].prompt_cache_hit_tokens == 576
    cold = sampler_of(base, prefix_cache_mib=0)
    assert_near(found, run_all(cold, [item]))
    assert sampler.memory.kv.num_allocated_blocks == 0
