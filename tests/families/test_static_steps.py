"""Decode steps that wait for nothing: of each family, recorded and replayed, they give what plain steps give.

On a GPU such a step is captured as a CUDA graph. Here the recorder of the graphs' tests refuses what CUDA refuses, the
experts of a layer are one product as they are there, and adapters in experts are found by the tables that the kernel
reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.families.configs import CONFIGS, VOCAB
from tests.numerics.graph_lab import Recorder, tables_in_use
from tests.numerics.lab import spec
from tests.numerics.sampling_lab import Letters, make_sampler, prompt, run_all, sample, state_of
from tinsmith.config import Settings
from tinsmith.errors import UnsupportedError
from tinsmith.model import BaseModel, experts, load_base
from tinsmith.sampling import Sampler
from tinsmith.types import RunState, SampleItem, Targets

TOLERANCE = 1e-5
WITH_STATES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
FEW = ("qwen3_moe", "deepseek_v3", "llama4", "gemma2")
IS_ALL = bool(os.environ.get("TINSMITH_TEST_ALL_FORMS"))  # `make forms`
KINDS = tuple(kind for kind in CONFIGS if kind not in WITH_STATES) if IS_ALL else FEW


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tables_in_use(monkeypatch):
        yield


@pytest.fixture
def grouped(make_base, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BaseModel]:
    """A base whose experts are one product, as on a GPU."""

    def make(kind: str, *, shares_factors: bool = True) -> BaseModel:
        info = make_base(kind, shares_factors=shares_factors).info
        with monkeypatch.context() as patched:
            patched.setattr(experts, "can_group", lambda weight: True)
            return load_base(info, device=torch.device("cpu"), dtype=torch.float32, shares_factors=shares_factors)

    return make


def states_of(base: BaseModel) -> dict[str, RunState]:
    targets = (Targets(), Targets(attn=False, unembed=False), Targets(mlp=False), Targets())
    ranks = (8, 3, 16, 24)
    return {f"a{i}": state_of(base, spec(f"a{i}", ranks[i], targets[i], seed=i + 1), 0.1) for i in range(4)}


def requests() -> list[SampleItem]:
    """They end one after another; some rows have an adapter in experts, some elsewhere, some none."""
    return [
        sample(f"r{i}", prompt(i, (1, 20, 70)[i % 3], VOCAB), (None, "a0", "a1", "a2", "a3")[i % 5], seed=i,
               max_tokens=3 + 3 * (i % 4))
        for i in range(9)
    ]  # fmt: skip


def recorded(base: BaseModel, capture: Recorder) -> Sampler:
    sampler = Sampler(base, Settings(), Letters(), is_paged=True, capture=capture)
    for key, state in states_of(base).items():
        sampler.add_adapter(key, state)
    return sampler


def assert_replays_are_steps(base: BaseModel, own: BaseModel) -> None:
    expected = run_all(make_sampler(base, states_of(base)), requests())
    capture = Recorder()
    sampler = recorded(own, capture)
    found = run_all(sampler, requests())
    graphs = sampler._walker.graphs
    assert graphs is not None
    assert capture.num_replays > 2 * graphs.num_captured > 0
    for name, result in found.items():
        (one,), (other,) = result.sequences, expected[name].sequences
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_give_what_plain_steps_give(make_base, grouped, kind: str) -> None:
    assert_replays_are_steps(make_base(kind), grouped(kind))


def test_also_where_experts_have_factors_of_their_own(make_base, grouped) -> None:
    """gpt-oss: gate and up apart, and biases."""
    assert_replays_are_steps(make_base("gpt_oss", shares_factors=False), grouped("gpt_oss", shares_factors=False))


def test_adapters_that_come_later_need_no_other_graph(grouped) -> None:
    """Other routes, other adapters of the same shape, rows of nobody: the numbers in the tables change, and no more."""
    base, capture = grouped("qwen3_moe"), Recorder()
    sampler = Sampler(base, Settings(), Letters(), is_paged=True, capture=capture)
    found = {}
    for i in range(3):
        state = state_of(base, spec(f"b{i}", 8, seed=i + 5), 0.1)
        sampler.add_adapter(f"b{i}", state)
        request = sample(f"r{i}", prompt(i, 9 + i, VOCAB), f"b{i}", seed=i, max_tokens=6)
        found |= run_all(sampler, [request])
        alone = run_all(make_sampler(base, {f"b{i}": state}), [request])
        np.testing.assert_array_equal(found[f"r{i}"].sequences[0].tokens, alone[f"r{i}"].sequences[0].tokens)
    assert sampler._walker.graphs is not None
    assert sampler._walker.graphs.num_captured == 1


@pytest.mark.parametrize(("kind", "why"), [("qwen3_moe", "one by one"), ("qwen3_5", "keep a state")])
def test_what_cannot_be_captured_is_refused_by_name(make_base, kind: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        Sampler(make_base(kind), Settings(cuda_graphs="on"), Letters(), is_paged=True, capture=Recorder())
