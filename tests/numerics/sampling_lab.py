"""Short ways to make samplers, adapters and sample requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tests.numerics.lab import VOCAB, spec
from tinsmith.config import Settings
from tinsmith.model import BaseModel, RowLayout, init_row
from tinsmith.sampling import Sampler
from tinsmith.sampling.memory import Memory
from tinsmith.types import OpId, RunSpec, RunState, SampleItem, SampleResult, SamplingParams, Targets

TARGETS = (Targets(), Targets(mlp=False, unembed=False), Targets(attn=False), Targets(attn=False, mlp=False))
RANKS = (4, 8, 12, 32)


class Letters:
    """A tokenizer whose text of token 3 is "<3>"."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


def state_of(base: BaseModel, run: RunSpec, spread: float = 0.05) -> RunState:
    """Weights whose B isn't zero."""
    layout = RowLayout.of(base.linears, run)
    tensors = layout.row_to_tensors("param", init_row(layout, run))
    rng = np.random.default_rng(run.seed)
    for name, array in tensors.items():
        if name.endswith("lora_B"):
            array[...] = rng.normal(0, spread, array.shape)
    return RunState(run, 0, tensors)


def mixed_states(base: BaseModel, count: int) -> dict[str, RunState]:
    """Adapters of ranks 4 to 32 and different targets, by key."""
    return {
        f"a{i}": state_of(base, spec(f"a{i}", RANKS[i % 4], TARGETS[(i // 4) % 4], seed=i + 1)) for i in range(count)
    }


def make_sampler(base: BaseModel, states: dict[str, RunState] | None = None, **settings: Any) -> Sampler:
    sampler = Sampler(base, Settings(**settings), Letters())
    for key, state in (states or {}).items():
        sampler.add_adapter(key, state)
    return sampler


def with_blocks(base: BaseModel, total: int, max_need: int | None = None, **settings: Any) -> Sampler:
    """A sampler whose KV memory is a few blocks, less than the smallest setting gives a model of this size.

    max_need: blocks that a tenant can have in any case; all, as a rule.
    """
    sampler = Sampler(base, Settings(**settings), Letters(), kv_blocks=total)
    if max_need is not None:
        memory = Memory(sampler.memory.kv, max_need)
        sampler.memory = sampler._stages.memory = memory
    return sampler


def sample(
    name: str,
    prompt: Sequence[int] | np.ndarray[Any, Any],
    adapter: str | None = None,
    num_samples: int = 1,
    seed: int = 0,
    prompt_logprobs: bool = False,
    topk: int = 0,
    scores: Mapping[str, Any] | None = None,
    **params: Any,
) -> SampleItem:
    """A request that never stops unless told to. `scores`: more fields of the item."""
    given = SamplingParams(**{"max_tokens": 8, "stop_tokens": (), **params})
    ids = np.array(prompt, np.int32)
    item = SampleItem(OpId(name), adapter, ids, given, num_samples, seed, prompt_logprobs, topk)
    return replace(item, **(scores or {}))


def prompt(seed: int, length: int, vocab: int = VOCAB) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, length]).integers(0, vocab, length)


def run_all(sampler: Sampler, items: Iterable[SampleItem] = (), max_steps: int = 10_000) -> dict[str, Any]:
    """Submit, step until nothing is left, and give the results by op id."""
    for item in items:
        sampler.submit(item)
    results: dict[str, Any] = {}
    for _ in range(max_steps):
        if not sampler.num_samples:
            return results
        results.update(sampler.step())
    raise AssertionError(f"{sampler.num_samples} requests are left after {max_steps} steps")


def assert_same_sample(one: SampleResult, other: SampleResult) -> None:
    """To the bit."""
    assert len(one.sequences) == len(other.sequences)
    for left, right in zip(one.sequences, other.sequences, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.logprobs.view(np.int32), right.logprobs.view(np.int32))
        assert left.stopped == right.stopped
        for name in ("topk_tokens", "topk_logprobs"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    for name in (
        "prompt_logprobs",
        "topk_prompt_tokens",
        "topk_prompt_logprobs",
        "prompt_target_logprobs",
        "prompt_alt_tokens",
        "prompt_alt_logprobs",
    ):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None)
        if left is not None:
            np.testing.assert_array_equal(left, right)
