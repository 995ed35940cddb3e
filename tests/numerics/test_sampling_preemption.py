"""When KV memory runs out, the youngest of whoever holds most gives it back and computes it again: nobody waits for
ever, and no answer shows it."""

from __future__ import annotations

from dataclasses import replace
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
from tinsmith.sampling import Sampler
from tinsmith.types import SampleCost, SampleResult

TOLERANCE = 1e-5


def by(tenant: str, name: str, tokens: Any, adapter: str | None = None, **params: Any) -> Any:
    return sample(name, tokens, adapter, scores={"scope": tenant}, **params)


def assert_nothing_is_held(sampler: Sampler) -> None:
    stages = sampler._stages
    assert sampler.num_samples == 0
    assert sampler.memory.num_held_blocks == sampler.memory.kv.num_allocated_blocks == 0
    assert not any((stages.running, stages.begun, stages.ready, stages.preempted, stages.num_waiting))


def assert_like(found: SampleResult, alone: SampleResult) -> None:
    for one, other in zip(found.sequences, alone.sequences, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE, rtol=0)
        assert one.stopped == other.stopped


def stopping_at(name: str, stop_after: int, states: Any, base: Any, **more: Any) -> Any:
    """A request that may go on to the end of the context, and in fact stops after some tokens."""
    ids = prompt(int(name[1:]), 20 + 7 * (int(name[1:]) % 5))
    free = sample(name, ids, seed=int(name[1:]), max_tokens=stop_after + 1, **more)
    tokens = run_all(make_sampler(base, states), [free])[name].sequences[0].tokens.tolist()
    return replace(free, params=replace(free.params, max_tokens=None, stop_tokens=(tokens[-1],)))


@pytest.fixture(scope="module")
def crowd(base: Any) -> tuple[Any, list[Any], dict[str, SampleResult]]:
    """Twenty-four requests, each of which may need nearly all of the memory."""
    states = mixed_states(base, 3)
    items = [
        stopping_at(f"r{i}", 40 + 11 * (i % 6), states, base, adapter=(None, "a0", "a1", "a2")[i % 4])
        for i in range(24)
    ]
    roomy = make_sampler(base, states)
    return states, items, run_all(roomy, items)


@pytest.mark.parametrize("total", [8, 16, 20])
def test_requests_that_may_need_all_run_together_and_end_as_they_would_alone(base, crowd, total):
    states, items, alone = crowd
    sampler = with_blocks(base, total)
    for key, state in states.items():
        sampler.add_adapter(key, state)
    for item in items:
        sampler.submit(item)
    together, results = [], {}
    while sampler.num_samples:
        results.update(sampler.step())
        if sampler._stages.num_waiting:
            together.append(len(sampler._stages.running))
        assert sampler.memory.num_held_blocks <= total
        assert sampler.memory.kv.num_allocated_blocks <= total
    for item in items:
        assert_like(results[item.op_id], alone[item.op_id])
    assert np.mean(together) >= total / 3  # a sequence here holds one to two blocks of 64
    assert sampler.preemptions.num_preempted > 0
    assert_nothing_is_held(sampler)


def test_in_deterministic_mode_they_end_with_the_same_bits(base, crowd):
    """What gave its memory back starts again from its first token; nobody who listens hears a token twice."""
    states, items, _ = crowd
    items = [replace(item, num_samples=1 + i % 2) for i, item in enumerate(items[:12])]
    alone, results, heard = {}, {}, {item.op_id: [] for item in items}
    for total, found in ((400, alone), (10, results)):
        sampler = with_blocks(base, total, deterministic=True, prefix_cache_mib=8)
        for key, state in states.items():
            sampler.add_adapter(key, state)
        for item in items:
            sampler.submit(item)
        while sampler.num_samples:
            found.update(sampler.step())
            for piece in sampler.progress({name: {0: len(tokens), 1: 10**6} for name, tokens in heard.items()}):
                heard[piece.op_id] += piece.sequence.tokens.tolist()
        assert (sampler.preemptions.num_preempted > 0) == (total == 10)
        assert_nothing_is_held(sampler)
        for name, tokens in heard.items():
            assert tokens == found[name].sequences[0].tokens.tolist()[: len(tokens)]
            tokens.clear()
    for item in items:
        assert_same_sample(results[item.op_id], alone[item.op_id])


def test_what_was_sampled_counts_though_it_is_sampled_again(base):
    """A request that is cancelled then costs all that was told of it."""
    sampler = with_blocks(base, 6, deterministic=True)
    for i in range(4):
        sampler.submit(sample(f"r{i}", prompt(i, 30), seed=i, max_tokens=150))
    told = dict.fromkeys((f"r{i}" for i in range(4)), 0)
    while not sampler.preemptions.num_preempted:
        sampler.step()
        for piece in sampler.progress({name: {0: known} for name, known in told.items()}):
            told[piece.op_id] += len(piece.sequence.tokens)
    (victim,) = (sequence.request.item.op_id for sequence in sampler._stages.preempted)
    assert told[victim] > 1
    assert {name: sampler.cancel(name).num_sampled for name in told} == told
    assert_nothing_is_held(sampler)


def test_groups_give_back_their_prompts_too(base):
    items = [sample(f"r{i}", prompt(i, 130), num_samples=3, seed=i, max_tokens=120) for i in range(5)]
    alone = run_all(make_sampler(base), items)
    sampler = with_blocks(base, 12)
    results = run_all(sampler, items)
    for item in items:
        assert_like(results[item.op_id], alone[item.op_id])
    assert sampler.preemptions.num_preempted > 0
    assert_nothing_is_held(sampler)


def test_the_oldest_never_gives_way_and_nobody_gives_way_for_ever(base):
    sampler = with_blocks(base, 10)
    for i in range(10):
        sampler.submit(sample(f"r{i}", prompt(i, 30), seed=i, max_tokens=280))
    ended: list[str] = []
    times: dict[str, int] = {}
    while sampler.num_samples:
        ended += [op_id for op_id, _ in sampler.step()]
        for sequence in sampler._stages.preempted:
            times[sequence.request.item.op_id] = sequence.num_preempted
    assert ended[0] == "r0"
    assert "r0" not in times
    assert times
    assert max(times.values()) <= 4
    assert_nothing_is_held(sampler)


def test_a_hostile_tenant_starves_nobody(base):
    """Alice's crowd asks for the whole context; Bob's few short requests, one after another, end about as soon as
    with nobody else."""
    sampler = with_blocks(base, 18, max_need=9)
    num_alice = 0
    for _ in range(12):
        sampler.submit(by("alice", f"a{num_alice}", prompt(num_alice, 60), seed=num_alice, max_tokens=None))
        num_alice += 1
    for _ in range(60):
        sampler.step()
    waits = []
    for i in range(5):
        sampler.submit(by("bob", f"b{i}", prompt(100 + i, 40), seed=i, max_tokens=60))
        steps = 0
        while True:
            steps += 1
            ended = [op_id for op_id, _ in sampler.step()]
            for op_id in ended:
                if op_id != f"b{i}":
                    sampler.submit(by("alice", f"a{num_alice}", prompt(num_alice, 60), seed=num_alice, max_tokens=None))
                    num_alice += 1
            if f"b{i}" in ended:
                break
            assert steps < 300
        waits.append(steps)
    assert max(waits) <= 70


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_group_of_another_tenant_begins_nothing_before_what_gave_way_earlier_and_holds_less(base, deterministic):
    """Alice's long prompt gives way to Bob's group. Once she holds nothing, what falls free of the group is hers."""
    sampler = with_blocks(base, 16, deterministic=deterministic)
    sampler.submit(by("alice", "oldest", prompt(0, 30), max_tokens=150))
    sampler.submit(by("alice", "long", prompt(1, 300), max_tokens=100))
    while not sampler.num_running:
        sampler.step()
    sampler.submit(replace(by("bob", "group", prompt(2, 30), max_tokens=60), num_samples=60))
    ended: dict[str, int] = {}
    num_steps = 0
    while sampler.num_samples:
        ended |= {op_id: num_steps for op_id, _ in sampler.step()}
        num_steps += 1
    assert sampler.preemptions.num_preempted > 0
    assert ended["long"] - ended["oldest"] < 100 + 60 + 40
    assert ended["long"] < ended["group"]
    assert_nothing_is_held(sampler)


def stages_of(sampler: Sampler, name: str) -> set[str]:
    """Where a request and its sequences are."""
    stages = sampler._stages
    request = sampler._requests.get(name)
    if request is None:
        return set()
    where = {"waiting": set(stages.asking(512)), "begun": stages.begun, "ready": stages.ready}
    found = {stage for stage, there in where.items() if request in there}
    recomputes = [stages.preempted.get(sequence) for sequence in request.sequences]
    return found | {"running" if r is None else "again" if r in stages.begun else "preempted" for r in recomputes}


@pytest.mark.parametrize("stage", ["waiting", "begun", "ready", "running", "preempted", "again"])
def test_cancelling_at_any_stage_leaves_nothing(base, stage):
    """Each request of a crowd is cancelled as soon as it is there."""
    sampler = with_blocks(base, 9, prefill_chunk_tokens=64, max_resident_samples=6, prefix_cache_mib=0)
    names = [f"r{i}" for i in range(6)]
    for i, name in enumerate(names):
        sampler.submit(sample(name, prompt(i, 90), num_samples=1 + i % 3, seed=i, max_tokens=70))
    num_cancelled = 0
    while sampler.num_samples:
        for name in names:
            if stage in stages_of(sampler, name):
                cost = sampler.cancel(name)
                assert 0 <= cost.num_prefilled <= 90
                assert cost.num_sampled <= 3 * 70
                assert stages_of(sampler, name) == set()
                assert sampler.cancel(name) == SampleCost()
                num_cancelled += 1
        sampler.step()
    assert num_cancelled > 0
    assert_nothing_is_held(sampler)


def test_what_is_recomputed_is_told_and_streams_go_on(base):
    sampler = with_blocks(base, 6)
    for i in range(4):
        sampler.submit(sample(f"r{i}", prompt(i, 30), seed=i, max_tokens=150))
    heard: dict[str, list[int]] = {f"r{i}": [] for i in range(4)}
    results: dict[str, Any] = {}
    while sampler.num_samples:
        results.update(sampler.step())
        for piece in sampler.progress({name: {0: len(tokens)} for name, tokens in heard.items()}):
            heard[piece.op_id] += piece.sequence.tokens.tolist()
    assert sampler.preemptions.num_preempted > 0
    assert sampler.preemptions.num_recomputed > 0
    for name, tokens in heard.items():
        assert tokens == results[name].sequences[0].tokens.tolist()[: len(tokens)]
        assert len(tokens) == 149
