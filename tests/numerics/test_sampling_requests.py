"""How requests are carried out: ends, seeds, siblings, cancelling, memory, adapters."""

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
from tinsmith.bases.catalog import describe, parse_all
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, UserError
from tinsmith.sampling import Sampler
from tinsmith.torch_engine import TorchEngine
from tinsmith.types import SampleCost


def assert_nothing_is_held(sampler: Sampler) -> None:
    assert sampler.num_samples == 0
    assert sampler.memory.num_held_blocks == 0
    assert sampler.memory.kv.num_allocated_blocks == 0


def test_siblings_share_the_prefill_and_differ(base):
    sampler = make_sampler(base)
    before = base.num_forwards
    result = run_all(sampler, [sample("r", prompt(1, 100), num_samples=8, seed=5, max_tokens=10)])["r"]
    assert base.num_forwards == before + 1 + 9
    assert len({tuple(s.tokens.tolist()) for s in result.sequences}) == 8
    first = run_all(make_sampler(base), [sample("r", prompt(1, 100), num_samples=3, seed=5, max_tokens=10)])["r"]
    for one, other in zip(first.sequences, result.sequences, strict=False):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_seed_repeats_and_another_differs(base):
    def tokens(seed: int) -> list[int]:
        return (
            run_all(make_sampler(base), [sample("r", [1, 2], seed=seed, max_tokens=20)])["r"]
            .sequences[0]
            .tokens.tolist()
        )

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)


def test_max_tokens_is_an_end_without_stop(base):
    result = run_all(make_sampler(base), [sample("r", [1, 2, 3], max_tokens=5)])["r"]
    assert result.sequences[0].tokens.shape == result.sequences[0].logprobs.shape == (5,)
    assert result.sequences[0].tokens.dtype == np.int32
    assert result.sequences[0].logprobs.dtype == np.float32
    assert not result.sequences[0].stopped
    assert result.prompt_logprobs is None
    assert result.topk_prompt_tokens is None


def test_without_max_tokens_a_sequence_fills_the_context(base):
    result = run_all(make_sampler(base), [sample("r", prompt(2, 490), max_tokens=None)])["r"]
    assert len(result.sequences[0].tokens) == 512 - 490


def test_stop_tokens_and_stop_strings_end_and_are_included(base):
    free = run_all(make_sampler(base), [sample("r", [1, 2, 3], max_tokens=40)])["r"].sequences[0].tokens.tolist()
    at = next(
        i
        for i in range(3, 40)
        if free[i] not in free[:i] and free[i - 1 : i + 1] not in [free[j - 1 : j + 1] for j in range(1, i)]
    )
    across = f"{free[at - 1]}><{free[at]}"
    items = [
        sample("token", [1, 2, 3], max_tokens=40, stop_tokens=(free[at],)),
        sample("string", [1, 2, 3], max_tokens=40, stop_strings=(f"<{free[at]}>",)),
        sample("across", [1, 2, 3], max_tokens=40, stop_strings=("never", across)),
        sample("last", [1, 2, 3], max_tokens=at + 1, stop_tokens=(free[at],)),
        sample("first", [1, 2, 3], max_tokens=40, stop_tokens=(free[0],)),
    ]
    results = run_all(make_sampler(base), items)
    for name in ("token", "string", "across", "last"):
        assert results[name].sequences[0].tokens.tolist() == free[: at + 1], name
        assert results[name].sequences[0].stopped
    assert results["first"].sequences[0].tokens.tolist() == free[:1]


def test_the_models_end_tokens_stop_unless_others_are_named(base, monkeypatch):
    free = run_all(make_sampler(base), [sample("r", [1, 2, 3], max_tokens=20)])["r"].sequences[0].tokens.tolist()
    info = type(base.info)(**{f: getattr(base.info, f) for f in base.info.__slots__} | {"eos_tokens": (free[4],)})
    monkeypatch.setattr(base, "info", info)
    items = [sample("eos", [1, 2, 3], max_tokens=20, stop_tokens=None), sample("never", [1, 2, 3], max_tokens=20)]
    results = run_all(make_sampler(base), items)
    assert results["eos"].sequences[0].tokens.tolist() == free[: free.index(free[4]) + 1]
    assert len(results["never"].sequences[0].tokens) == 20


def test_requests_join_while_others_decode(base):
    sampler = make_sampler(base)
    sampler.submit(sample("long", prompt(1, 10), max_tokens=100))
    for _ in range(10):
        assert sampler.step() == []
    sampler.submit(sample("short", prompt(2, 10), max_tokens=3))
    steps = 0
    while not (ended := sampler.step()):
        steps += 1
    assert [op_id for op_id, _ in ended] == ["short"]
    assert steps <= 3
    assert sampler.num_samples == 1


def test_cancelling_frees_what_a_request_holds(base):
    states = mixed_states(base, 2)
    sampler = make_sampler(base, states, prefill_chunk_tokens=64, max_resident_samples=4, deterministic=True)
    items = [sample(f"r{i}", prompt(i, 150), f"a{i % 2}", num_samples=2, max_tokens=50) for i in range(6)]
    for item in items:
        sampler.submit(item)
    for _ in range(8):
        sampler.step()
    costs = [sampler.cancel(item.op_id) for item in items[:5]]
    assert costs[0].num_prefilled + costs[0].num_cached == 150
    assert 0 < costs[0].num_sampled <= 2 * 8
    assert all(cost.num_prefilled <= 150 for cost in costs)
    assert sampler.cancel(items[0].op_id) == SampleCost()
    left = run_all(sampler)
    assert list(left) == ["r5"]
    alone = make_sampler(base, states, prefill_chunk_tokens=64, deterministic=True)
    assert_same_sample(left["r5"], run_all(alone, [items[5]])["r5"])
    assert_nothing_is_held(sampler)


def test_a_hundred_requests_finish_in_a_small_memory(base):
    states = mixed_states(base, 5)
    sampler = make_sampler(base, states, kv_cache_mib=1, max_resident_samples=64)
    total = sampler.memory.kv.total
    items = [
        sample(f"r{i}", prompt(i, 1 + (i * 37) % 250), f"a{i % 5}", num_samples=1 + i % 4, max_tokens=1 + (i * 29) % 70)
        for i in range(100)
    ]
    for item in items:
        sampler.submit(item)
    results, most = {}, 0
    while sampler.num_samples:
        results.update(sampler.step())
        most = max(most, sampler.memory.kv.num_allocated_blocks)
        assert sampler.memory.num_held_blocks <= total
        assert sampler.memory.kv.num_allocated_blocks <= total
    assert most > 0.8 * total
    for item in items:
        assert [len(s.tokens) for s in results[item.op_id].sequences] == [item.params.max_tokens] * item.num_samples
    assert_nothing_is_held(sampler)


def test_three_hundred_requests_flow_through_the_seats(base):
    """Ragged requests of forty snapshots: seats are filled again as they fall free, so no batch is ever drained.

    Batches that wait for their longest sequence would keep little more than half of the seats busy.
    """
    seats = 32
    states = mixed_states(base, 40)
    sampler = make_sampler(base, states, kv_cache_mib=8, max_resident_samples=seats, deterministic=True)
    total = sampler.memory.kv.total
    items = [
        sample(f"r{i:03}", prompt(i, 1 + (i * 37) % 60), f"a{i % 40}", seed=i, max_tokens=2 + (i * 29) % 39)
        for i in range(300)
    ]
    pending, results, busy = list(reversed(items)), {}, []
    for _ in range(120):
        sampler.submit(pending.pop())
    while sampler.num_samples:
        for _ in range(min(4, len(pending))):
            sampler.submit(pending.pop())
        is_crowded = sampler._stages.num_waiting > 0
        results.update(sampler.step())
        if is_crowded:
            busy.append(len(sampler._stages.running))
        assert sampler.memory.num_held_blocks <= total
        assert sampler.memory.kv.num_allocated_blocks <= total
    assert len(results) == 300
    assert np.mean(busy[5:]) > 0.85 * seats
    for item in items:
        assert len(results[item.op_id].sequences[0].tokens) == item.params.max_tokens
    for item in items[::75]:
        alone = make_sampler(base, states, deterministic=True)
        assert_same_sample(results[item.op_id], run_all(alone, [item])[item.op_id])
    assert_nothing_is_held(sampler)


def test_what_can_never_fit_is_refused_with_the_setting(base):
    for total, item in (
        (2, sample("long", prompt(1, 100), max_tokens=200)),
        (1, sample("prompt", prompt(1, 100), max_tokens=1)),
        (3, sample("siblings", prompt(1, 100), num_samples=2, max_tokens=60)),
    ):
        small = with_blocks(base, total)
        with pytest.raises(UserError, match="--kv-cache-mib"):
            small.submit(item)
        assert_nothing_is_held(small)
    small = with_blocks(base, 2)
    result = run_all(small, [sample("open", prompt(1, 100), max_tokens=None)])["open"]
    assert len(result.sequences[0].tokens) == 128 - 100 + 1


@pytest.mark.parametrize("total", [4, 5, 6, 8, 11])
def test_no_two_requests_wait_for_each_other(base, total):
    """Memory is tight: sequences pause, prompts wait for samples to start; all finish with their own bits."""
    states = mixed_states(base, 3)
    items = [
        sample(
            f"r{i}",
            prompt(i, (60, 64, 20, 100)[i % 4]),
            f"a{i % 3}",
            num_samples=1 + i % 3,
            max_tokens=(70, 30, 1, 28)[i % 4],
        )
        for i in range(12)
    ]
    expected = run_all(make_sampler(base, states, deterministic=True), items)
    sampler = with_blocks(base, total, deterministic=True)
    for key, state in states.items():
        sampler.add_adapter(key, state)
    for item in items:
        sampler.submit(item)
    results = {}
    for _ in range(5000):
        results.update(sampler.step())
        assert sampler.memory.kv.num_allocated_blocks <= total
        if not sampler.num_samples:
            break
    for item in items:
        assert_same_sample(results[item.op_id], expected[item.op_id])
    assert_nothing_is_held(sampler)


def test_refusals_name_the_cure(base):
    sampler = make_sampler(base)
    for item, words in (
        (sample("r", [], max_tokens=3), "empty"),
        (sample("r", prompt(1, 512)), "shorten"),
        (sample("r", prompt(1, 500), max_tokens=13), "1 to 12"),
        (sample("r", [1], max_tokens=0), "1 to 511"),
        (sample("r", [1], adapter="nobody"), "nobody"),
    ):
        with pytest.raises(UserError, match=words):
            sampler.submit(item)
    assert_nothing_is_held(sampler)
    sampler.cancel("unknown")


def test_a_memory_without_one_block_is_a_bad_setting(base):
    with pytest.raises(ConfigError, match="--kv-cache-mib"):
        make_sampler(base, kv_cache_mib=0)


def test_idle_adapters_go_least_recently_used_first(base):
    states = mixed_states(base, 5)
    sampler = make_sampler(base, max_resident_adapters=2)
    sampler.add_adapter("a0", states["a0"])
    sampler.submit(sample("r", [1, 2], "a0", max_tokens=30))
    sampler.add_adapter("a1", states["a1"])
    sampler.add_adapter("a2", states["a2"])
    assert [sampler.has_adapter(f"a{i}") for i in range(3)] == [True, False, True]
    run_all(sampler)
    run_all(sampler, [sample("s", [1, 2], "a2", max_tokens=2)])
    sampler.add_adapter("a3", states["a3"])
    assert [sampler.has_adapter(f"a{i}") for i in range(4)] == [False, False, True, True]


def test_an_adapter_of_another_base_is_refused(base):
    state = mixed_states(base, 1)["a0"]
    bad = {name: tensor[:, :-1] for name, tensor in state.tensors.items()}
    with pytest.raises(UserError, match="shape"):
        make_sampler(base).add_adapter("bad", type(state)(state.spec, 0, bad))


def test_the_engine_samples_until_a_stop_string_of_its_tokenizer():
    (ref,) = parse_all(["tinsmith/tiny"])
    engine = TorchEngine(describe(ref), Settings(threads=1))
    tokenizer = ChatTokenizer.from_dir(ref.path)
    ids = tokenizer.encode("Hello, what is this?")
    engine.submit_sample(sample("free", ids, max_tokens=60, temperature=0.0))
    free = drain(engine)["free"].sequences[0].tokens.tolist()
    text = tokenizer.decode(free)
    string = text[len(text) // 2 : len(text) // 2 + 3]
    engine.submit_sample(sample("cut", ids, max_tokens=60, temperature=0.0, stop_strings=(string,)))
    cut = drain(engine)["cut"].sequences[0]
    assert cut.stopped
    assert cut.tokens.tolist() == free[: len(cut.tokens)]
    assert string in tokenizer.decode(cut.tokens.tolist())
    assert string not in tokenizer.decode(cut.tokens[:-1].tolist())


def drain(engine: TorchEngine) -> dict[str, Any]:
    results: dict[str, Any] = {}
    while engine.num_samples:
        results.update(engine.step_samples())
    return results


def test_most_likely_tokens_of_each_step_whatever_the_neighbours_ask(base):
    wanted = sample(
        "r", prompt(1, 30), num_samples=2, seed=5, max_tokens=12, scores={"topk_sample_logprobs": 3}, temperature=0.8
    )
    alone = run_all(make_sampler(base), [wanted])["r"]
    others = [
        sample(f"n{k}", prompt(k, 20), seed=k, max_tokens=20, scores={"topk_sample_logprobs": k}) for k in (0, 2, 7)
    ]
    crowd = run_all(make_sampler(base), [others[0], wanted, *others[1:]])
    plain = run_all(
        make_sampler(base), [sample("r", prompt(1, 30), num_samples=2, seed=5, max_tokens=12, temperature=0.8)]
    )
    for one, among, bare in zip(alone.sequences, crowd["r"].sequences, plain["r"].sequences, strict=True):
        assert one.topk_tokens.shape == one.topk_logprobs.shape == (12, 3)
        np.testing.assert_array_equal(one.topk_tokens, among.topk_tokens)
        np.testing.assert_array_equal(one.topk_logprobs, among.topk_logprobs)
        np.testing.assert_array_equal(one.tokens, bare.tokens)
        assert (np.diff(one.topk_logprobs) <= 0).all()
        for token, logprob, tops, values in zip(
            one.tokens, one.logprobs, one.topk_tokens, one.topk_logprobs, strict=True
        ):
            found = values[tops == token]
            assert found.size == 0 or found[0] == logprob
            assert logprob <= values[0]
    assert crowd["n7"].sequences[0].topk_tokens.shape[1] == 7
    assert crowd["n0"].sequences[0].topk_tokens is None


def test_a_frequency_penalty_ends_repetition(base):
    def num_kinds(penalty: float) -> int:
        asked = sample("r", [7, 7, 7, 7], max_tokens=60, temperature=0, frequency_penalty=penalty)
        return len(set(run_all(make_sampler(base), [asked])["r"].sequences[0].tokens.tolist()))

    assert num_kinds(2.0) > num_kinds(0.0)


def test_progress_is_the_beginning_of_the_result(base):
    sampler = make_sampler(base)
    sampler.submit(sample("r", prompt(1, 20), num_samples=2, seed=5, max_tokens=9, scores={"topk_sample_logprobs": 2}))
    sampler.submit(sample("other", prompt(1, 20), max_tokens=9))
    assert sampler.progress({"r": {}}) == []
    heard: dict[int, list[int]] = {0: [], 1: []}
    ended: dict[str, Any] = {}
    while sampler.num_samples:
        ended |= dict(sampler.step())
        for piece in sampler.progress({"r": {index: len(tokens) for index, tokens in heard.items()}}):
            assert piece.op_id == "r"
            assert piece.start == len(heard[piece.index])
            assert piece.sequence.topk_tokens.shape == (len(piece.sequence.tokens), 2)
            heard[piece.index] += piece.sequence.tokens.tolist()
    for index, sequence in enumerate(ended["r"].sequences):
        assert heard[index] == sequence.tokens.tolist()[: len(heard[index])]
        assert len(heard[index]) == 8
