"""Prompts that begin like earlier ones are computed from where they differ, and nothing of the answer shows it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.numerics.sampling_lab import assert_same_sample, make_sampler, mixed_states, prompt, run_all, sample

CHUNK = 32
TO_THE_BIT: dict[str, Any] = {"prefill_chunk_tokens": CHUNK, "deterministic": True}


def ask(name, ids, adapter="a0", scope="t", **more):
    return replace(sample(name, ids, adapter, seed=3, **{"max_tokens": 5, **more}), scope=scope)


@pytest.fixture
def states(base):
    return mixed_states(base, 2)


def alone(base, states, item):
    cold = make_sampler(base, states, **TO_THE_BIT, prefix_cache_mib=0)
    return run_all(cold, [item])[item.op_id]


def test_a_later_turn_begins_where_the_earlier_one_ended(base, states):
    sampler = make_sampler(base, states, **TO_THE_BIT)
    turn = prompt(1, 100)
    first = run_all(sampler, [ask("first", turn)])["first"]
    assert first.prompt_cache_hit_tokens == 0
    item = ask("second", np.concatenate([turn, first.sequences[0].tokens, prompt(2, 40)]), num_samples=3)
    before = base.num_forwards
    second = run_all(sampler, [item])["second"]
    assert second.prompt_cache_hit_tokens == 96
    assert base.num_forwards == before + 2 + 4
    assert_same_sample(second, alone(base, states, item))


@pytest.mark.parametrize(("length", "hits"), [(31, 0), (32, 0), (33, 32), (64, 32), (65, 64)])
def test_the_last_token_is_always_computed(base, states, length, hits):
    sampler = make_sampler(base, states, **TO_THE_BIT)
    item = ask("r", prompt(3, length))
    first, again = (run_all(sampler, [item])["r"] for _ in range(2))
    assert again.prompt_cache_hit_tokens == hits
    assert_same_sample(first, again)


def test_positions_that_are_scored_are_computed(base, states):
    sampler = make_sampler(base, states, **TO_THE_BIT)
    ids = prompt(4, 130)
    run_all(sampler, [ask("first", ids)])
    for scores, hits in (({}, 0), ({"prompt_logprobs_last_n": 20}, 96), ({"prompt_logprobs_last_n": 100}, 0)):
        item = ask("r", ids, prompt_logprobs=True, max_tokens=1, scores=scores)
        found = run_all(sampler, [item])["r"]
        assert found.prompt_cache_hit_tokens == hits
        assert_same_sample(found, alone(base, states, item))


def test_other_weights_and_other_scopes_share_nothing(base, states):
    sampler = make_sampler(base, states, **TO_THE_BIT)
    ids = prompt(5, 70)
    run_all(sampler, [ask("first", ids)])
    others = [ask("weights", ids, "a1"), ask("base", ids, None), ask("scope", ids, scope="u"), ask("same", ids)]
    found = run_all(sampler, others)
    assert [found[item.op_id].prompt_cache_hit_tokens for item in others] == [0, 0, 0, 64]
    for item in others:
        assert_same_sample(found[item.op_id], alone(base, states, item))


def test_the_least_recently_used_go_first(base, states):
    sampler = make_sampler(base, states, **TO_THE_BIT, prefix_cache_mib=1)
    run_all(sampler, [ask("probe", prompt(0, 40))])
    room = 2**20 // sampler._prefixes.num_bytes
    for i in range(1, room + 1):
        run_all(sampler, [ask("r", prompt(i, 40), max_tokens=1)])
        run_all(sampler, [ask("kept", prompt(1, 40), max_tokens=1)])
        assert sampler._prefixes.num_bytes <= 2**20
    assert run_all(sampler, [ask("kept", prompt(1, 40))])["kept"].prompt_cache_hit_tokens == 32
    assert run_all(sampler, [ask("gone", prompt(0, 40))])["gone"].prompt_cache_hit_tokens == 0


def test_many_ragged_requests_with_shared_beginnings(base, states):
    """In a small memory, in chunks, with hits and misses mixed: each has the bits of one alone."""
    sampler = make_sampler(base, states, **TO_THE_BIT, kv_cache_mib=1, max_resident_samples=6)
    stem = prompt(6, 100)
    items = [
        ask(
            f"r{i}",
            np.concatenate([stem[: 25 * (i % 5)], prompt(i, 1 + 17 * (i % 4))]),
            f"a{i % 2}",
            num_samples=1 + i % 2,
        )
        for i in range(24)
    ]
    found = run_all(sampler, items)
    assert any(result.prompt_cache_hit_tokens for result in found.values())
    for item in items:
        assert_same_sample(found[item.op_id], alone(base, states, item))
    assert sampler.memory.num_held_blocks == 0
