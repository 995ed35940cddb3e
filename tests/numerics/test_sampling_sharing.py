"""However much one tenant samples, another's request is taken at once, and neither notices a bit of the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.numerics.sampling_lab import (
    assert_same_sample,
    make_sampler,
    mixed_states,
    prompt,
    run_all,
    sample,
    with_blocks,
)
from tinsmith.types import Failure


def by(tenant: str, name: str, tokens: Any, adapter: str | None = None, **params: Any) -> Any:
    return sample(name, tokens, adapter, scores={"scope": tenant}, **params)


def steps_until(sampler: Any, name: str, at_most: int) -> Any:
    for step in range(1, at_most + 1):
        for op_id, result in sampler.step():
            if op_id == name:
                assert not isinstance(result, Failure)
                return step, result
    raise AssertionError(f"{name} had no answer after {at_most} steps")


@pytest.mark.parametrize("length", [5, 150])
def test_one_request_of_many_samples_keeps_nobody_waiting(base, length):
    states = mixed_states(base, 2)
    sampler = make_sampler(base, states, max_resident_samples=32, prefill_chunk_tokens=64, deterministic=True)
    crowd = by("alice", "crowd", prompt(1, 20), "a0", num_samples=60, seed=1, max_tokens=30)
    short = by("bob", "short", prompt(2, length), "a1", num_samples=2, seed=2, max_tokens=4)
    sampler.submit(crowd)
    for _ in range(5):
        sampler.step()
    assert len(sampler._stages.running) == 28
    sampler.submit(short)
    _, result = steps_until(sampler, "short", 6 if length < 64 else 12)
    alone = make_sampler(base, states, prefill_chunk_tokens=64, deterministic=True)
    assert_same_sample(result, run_all(alone, [short])["short"])
    assert_same_sample(run_all(sampler)["crowd"], run_all(alone, [crowd])["crowd"])


def test_a_crowd_of_long_prompts_keeps_nobody_waiting(base):
    sampler = make_sampler(base, max_resident_samples=64, prefill_chunk_tokens=32, prefix_cache_mib=0)
    for i in range(30):
        sampler.submit(by("alice", f"long{i}", prompt(i, 200), max_tokens=2))
    sampler.step()
    sampler.submit(by("bob", "short", prompt(99, 20), max_tokens=3))
    steps_until(sampler, "short", 6)


def test_one_who_fills_the_memory_keeps_nobody_waiting(base):
    """Eighteen blocks: Alice's sequences grow into hers, giving way to each other, and Bob finds a free one."""
    sampler = with_blocks(base, 18, max_need=4, deterministic=True)
    for i in range(12):
        sampler.submit(by("alice", f"r{i}", prompt(i, 60), seed=i, max_tokens=100))
    for _ in range(20):
        sampler.step()
    assert sampler._stages.counts.num_preempted
    assert sampler.memory.held_by("alice") <= 15
    sampler.submit(by("bob", "short", prompt(50, 20), max_tokens=4))
    steps_until(sampler, "short", 8)
    results = run_all(sampler)
    assert [len(results[f"r{i}"].sequences[0].tokens) for i in range(12) if f"r{i}" in results] == [100] * len(results)


def test_a_tenants_own_snapshots_share_too(base):
    states = mixed_states(base, 2)
    sampler = make_sampler(base, states, max_resident_samples=8)
    sampler.submit(by("alice", "crowd", prompt(1, 20), "a0", num_samples=60, seed=1, max_tokens=30))
    for _ in range(5):
        sampler.step()
    sampler.submit(by("alice", "short", prompt(2, 5), "a1", max_tokens=3))
    steps_until(sampler, "short", 35)
    assert np.mean([s.request.item.op_id == "crowd" for s in sampler._stages.running]) > 0.9
