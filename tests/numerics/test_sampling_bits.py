"""Whatever else is running, tokens and logprobs are the same: to the bit in deterministic mode, otherwise within
rounding."""

import numpy as np
import pytest

from tests.numerics.sampling_lab import assert_same_sample, make_sampler, mixed_states, prompt, run_all, sample
from tinsmith.types import SampleItem

LENGTHS = (1, 2, 7, 15, 16, 17, 33, 62, 63, 64, 65, 100, 127, 128, 140, 190)


def crowd(count: int, vocab: int = 211, longest: int = 40) -> list[SampleItem]:
    """Requests of mixed adapters, lengths and parameters."""
    return [
        sample(
            f"r{i}",
            prompt(i, LENGTHS[i % len(LENGTHS)], vocab),
            adapter=None if i % 7 == 6 else f"a{i % 13}",
            seed=i,
            num_samples=1 + 2 * (i % 9 == 8),
            max_tokens=1 + (i * 5) % longest,
            temperature=(1.0, 0.0, 0.7, 1.3)[i % 4],
            top_k=(-1, 20)[i % 5 == 1],
            top_p=(1.0, 0.8)[i % 3 == 2],
            prompt_logprobs=i % 2 == 0,
            topk=3 * (i % 4 == 1),
        )
        for i in range(count)
    ]


def check(base, items, among, **more):
    settings = {"deterministic": True, **more}
    states = mixed_states(base, 13)
    together = run_all(make_sampler(base, states, **settings), items)
    for index in among:
        alone = run_all(make_sampler(base, states, **settings), [items[index]])
        assert_same_sample(alone[items[index].op_id], together[items[index].op_id])


def test_a_sequence_among_thirty_others_has_the_bits_of_one_alone(base, threads):
    if threads == 1:
        check(base, crowd(31), range(31))
    else:
        check(base, crowd(31, longest=11), (0, 15, 29))


def test_so_it_is_when_products_are_split_over_threads(wide_base, threads):
    check(wide_base, crowd(31, 4001, longest=11), (0, 8, 17, 30))


def test_so_it_is_in_small_chunks_and_little_memory(base):
    check(base, crowd(31), range(0, 31, 3), prefill_chunk_tokens=32, kv_cache_mib=1)


def test_so_it_is_without_the_compiled_program(base, threads):
    check(base, crowd(31, longest=11), range(0, 31, 3), compiled_adapters=False)


def test_arrival_order_and_seats_change_nothing(base):
    states, items = mixed_states(base, 13), crowd(31)
    expected = run_all(make_sampler(base, states, deterministic=True), items)
    few_seats = run_all(make_sampler(base, states, max_resident_samples=3, deterministic=True), items[::-1])
    sampler = make_sampler(base, states, deterministic=True)
    late = {}
    for item in items:
        sampler.submit(item)
        late.update(sampler.step())
    late.update(run_all(sampler))
    for item in items:
        assert_same_sample(expected[item.op_id], few_seats[item.op_id])
        assert_same_sample(expected[item.op_id], late[item.op_id])


@pytest.mark.parametrize("num_rows", [1, 5, 16, 40])
def test_many_samples_of_one_adapter_have_the_bits_of_one(base, num_rows):
    states = mixed_states(base, 1)

    def sampled(num_samples: int):
        asked = sample("g", prompt(1, 20), "a0", num_samples, seed=3, max_tokens=20)
        return run_all(make_sampler(base, states, deterministic=True), [asked])

    group, one = sampled(num_rows), sampled(1)
    np.testing.assert_array_equal(group["g"].sequences[0].tokens, one["g"].sequences[0].tokens)
    np.testing.assert_array_equal(group["g"].sequences[0].logprobs, one["g"].sequences[0].logprobs)


def test_a_diverged_neighbour_fails_alone_and_poisons_nobody(base):
    states, items = mixed_states(base, 13), crowd(16)
    expected = run_all(make_sampler(base, states, deterministic=True), items)
    for tensor in states["a0"].tensors.values():
        tensor[...] = np.inf
    sampler = make_sampler(base, states, kv_cache_mib=1, deterministic=True)
    results = run_all(sampler, items)
    for item in items:
        if item.adapter == "a0":
            assert results[item.op_id].code == "non_finite_logits"
            assert "checkpoint" in results[item.op_id].message
        else:
            assert_same_sample(expected[item.op_id], results[item.op_id])
    assert sampler.memory.num_held_blocks == sampler.memory.kv.num_allocated_blocks == 0


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_tokens": 32, "kv_cache_mib": 1}])
def test_otherwise_neighbours_change_nothing_beyond_rounding(base, settings):
    states, items = mixed_states(base, 13), crowd(31)
    together = run_all(make_sampler(base, states, **settings), items)
    for item in items:
        alone = run_all(make_sampler(base, states), [item])[item.op_id]
        for one, other in zip(alone.sequences, together[item.op_id].sequences, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
