"""What is asked about a prompt or beside a sample: against transformers with peft, and to the bit among others."""

import numpy as np
import pytest
import torch

from tests.numerics.lab import VOCAB, PeftTwin
from tests.numerics.sampling_lab import assert_same_sample, make_sampler, mixed_states, prompt, run_all, sample
from tinsmith.sampling.scores import PromptScores
from tinsmith.types import PromptTargets

TOLERANCE = 1e-5
NO_LOGPROB = -99999.0


def reference(base, state, tokens, temperature=1.0):
    """[N, V] of transformers with peft."""
    with torch.no_grad():
        logits = PeftTwin(base, state).model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    return (logits / temperature).log_softmax(-1).numpy()


def dense(ids):
    return PromptTargets(ids.reshape(-1), ids.shape)


def sparse(ids):
    rows, cols = np.nonzero(ids >= 0)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(ids)))])
    return PromptTargets(ids[rows, cols], ids.shape, crow.astype(np.int64), cols.astype(np.int64))


def some_targets(num_prompt, k=3, seed=0):
    """Mostly -1, the first rows wholly."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (num_prompt - 1, k))
    ids[rng.random(ids.shape) < 0.7] = -1
    ids[: num_prompt // 3] = -1
    ids[-1, 0] = 5
    return ids


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_top_k_of_samples(base, temperature):
    states = mixed_states(base, 3)
    items = [
        sample(f"r{i}", prompt(i, 5 + 30 * i), f"a{i}", seed=i, num_samples=2, max_tokens=12, temperature=temperature,
               scores={"topk_sample_logprobs": (4, 0, 7)[i]})
        for i in range(3)
    ]  # fmt: skip
    results = run_all(make_sampler(base, states), items)
    assert results["r1"].sequences[0].topk_tokens is None
    for i in (0, 2):
        for sequence in results[f"r{i}"].sequences:
            k = items[i].topk_sample_logprobs
            assert sequence.topk_tokens.shape == sequence.topk_logprobs.shape == (12, k)
            assert (sequence.topk_tokens.dtype, sequence.topk_logprobs.dtype) == (np.int32, np.float32)
            tokens = np.concatenate([items[i].prompt, sequence.tokens])
            rows = reference(base, states[f"a{i}"], tokens, temperature)[len(items[i].prompt) - 1 : -1]
            np.testing.assert_allclose(sequence.topk_logprobs, -np.sort(-rows, axis=1)[:, :k], atol=TOLERANCE, rtol=0)
            chosen = np.take_along_axis(rows, sequence.topk_tokens.astype(np.int64), axis=1)
            np.testing.assert_allclose(sequence.topk_logprobs, chosen, atol=TOLERANCE, rtol=0)


def test_greedy_is_the_first_of_the_top(base):
    asked = sample("r", prompt(1, 9), max_tokens=20, temperature=0.0, scores={"topk_sample_logprobs": 2})
    sequence = run_all(make_sampler(base), [asked])["r"].sequences[0]
    np.testing.assert_array_equal(sequence.topk_tokens[:, 0], sequence.tokens)
    np.testing.assert_array_equal(sequence.topk_logprobs[:, 0], sequence.logprobs)


@pytest.mark.parametrize("last_n", [1, 5, 63, 89])
def test_the_last_n_of_a_prompt(base, last_n):
    states = mixed_states(base, 1)
    whole = sample("r", prompt(5, 90), "a0", max_tokens=3, prompt_logprobs=True, topk=4)
    asked = sample(
        "r", prompt(5, 90), "a0", max_tokens=3, prompt_logprobs=True, topk=4, scores={"prompt_logprobs_last_n": last_n}
    )
    expected = run_all(make_sampler(base, states, prefill_chunk_tokens=64), [whole])["r"]
    found = run_all(make_sampler(base, states, prefill_chunk_tokens=64), [asked])["r"]
    assert np.isnan(found.prompt_logprobs[:-last_n]).all()
    np.testing.assert_allclose(found.prompt_logprobs[-last_n:], expected.prompt_logprobs[-last_n:], atol=1e-6, rtol=0)
    assert (found.topk_prompt_tokens[:-last_n] == 0).all()
    assert (found.topk_prompt_logprobs[:-last_n] == NO_LOGPROB).all()
    top = expected.topk_prompt_logprobs[-last_n:]
    np.testing.assert_allclose(found.topk_prompt_logprobs[-last_n:], top, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(found.sequences[0].tokens, expected.sequences[0].tokens)
    rows = reference(base, states["a0"], asked.prompt)[np.arange(89), asked.prompt[1:]]
    np.testing.assert_allclose(found.prompt_logprobs[-last_n:], rows[-last_n:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layout", [dense, sparse])
@pytest.mark.parametrize("chunk_tokens", [512, 32])
def test_chosen_ids_in_a_prompt(base, layout, chunk_tokens):
    states = mixed_states(base, 1)
    ids = some_targets(90)
    targets = layout(ids)
    asked = sample("r", prompt(6, 90), "a0", max_tokens=1, scores={"prompt_targets": targets})
    sampler = make_sampler(base, states, prefill_chunk_tokens=chunk_tokens)
    before = base.num_forwards
    found = run_all(sampler, [asked])["r"]
    assert base.num_forwards == before + -(-90 // chunk_tokens)
    assert found.prompt_logprobs is None
    assert found.prompt_target_logprobs.dtype == np.float32
    rows = reference(base, states["a0"], asked.prompt)
    expected = np.where(targets.ids >= 0, rows[targets.rows, targets.ids], 0)
    np.testing.assert_allclose(found.prompt_target_logprobs, expected, atol=TOLERANCE, rtol=0)


def test_rows_before_the_first_that_is_asked_for_need_no_logits(base):
    ids = np.full((89, 1), -1)
    ids[-1, 0] = 3
    asked = sample("r", prompt(6, 90), max_tokens=1, scores={"prompt_targets": dense(ids)})
    sampler = make_sampler(base)
    sampler.submit(asked)
    (request,) = sampler._stages.asking(512)
    assert request.scores.wanted == range(88, 89)
    assert not PromptScores(sample("r", prompt(6, 90))).wanted


def test_draws_at_every_position_of_a_prompt(base):
    """With replacement, from the whole distribution at the request's temperature; logprobs are the model's."""
    states = mixed_states(base, 1)
    k = 128
    asked = sample(
        "r", prompt(7, 40), "a0", max_tokens=1, seed=3, temperature=0.7, top_k=2, scores={"prompt_alt_tokens_k": k}
    )
    found = run_all(make_sampler(base, states), [asked])["r"]
    assert found.prompt_alt_tokens.shape == found.prompt_alt_logprobs.shape == (39, k)
    assert (found.prompt_alt_tokens.dtype, found.prompt_alt_logprobs.dtype) == (np.int64, np.float32)
    rows = reference(base, states["a0"], asked.prompt)[:39]
    expected = np.take_along_axis(rows, found.prompt_alt_tokens, axis=1)
    np.testing.assert_allclose(found.prompt_alt_logprobs, expected, atol=TOLERANCE, rtol=0)
    probs = np.exp(reference(base, states["a0"], asked.prompt, 0.7)[:39].astype(np.float64))
    order = np.argsort(-probs, axis=1)
    likely = np.take_along_axis(np.cumsum(np.take_along_axis(probs, order, 1), axis=1), np.argsort(order, 1), 1) < 0.5
    share = np.take_along_axis(likely, found.prompt_alt_tokens, axis=1).mean()
    mass = (probs * likely).sum(1).mean()
    assert share == pytest.approx(mass, abs=4 * np.sqrt(0.25 / (39 * k)))
    assert len({tuple(row) for row in found.prompt_alt_tokens.T}) == k


def test_draws_repeat_with_the_seed_and_greedy_ones_are_the_likeliest(base):
    def drawn(seed=3, temperature=1.0, chunk_tokens=512):
        asked = sample("r", prompt(7, 40), max_tokens=1, seed=seed, temperature=temperature,
                       scores={"prompt_alt_tokens_k": 4})  # fmt: skip
        return run_all(make_sampler(base, prefill_chunk_tokens=chunk_tokens), [asked])["r"].prompt_alt_tokens

    np.testing.assert_array_equal(drawn(), drawn(chunk_tokens=16))
    assert (drawn() != drawn(seed=4)).any()
    greedy = drawn(temperature=0.0)
    assert (greedy == greedy[:, :1]).all()


def test_what_is_asked_among_others_has_the_bits_of_asking_alone(base):
    states = mixed_states(base, 4)

    def asked(i):
        scores = {
            "topk_sample_logprobs": i % 4,
            "prompt_targets": (dense, sparse)[i % 2](some_targets(20 + i, seed=i)),
            "prompt_alt_tokens_k": i % 3,
            "prompt_logprobs_last_n": 1 + i,
        }
        return sample(
            f"r{i}", prompt(i, 20 + i), f"a{i % 4}", seed=i, max_tokens=6, prompt_logprobs=True, scores=scores
        )

    items = [asked(i) for i in range(12)]
    together = run_all(make_sampler(base, states, deterministic=True), items)
    for item in items:
        alone = make_sampler(base, states, deterministic=True)
        assert_same_sample(together[item.op_id], run_all(alone, [item])[item.op_id])


def test_compute_logprobs_is_one_prefill(base):
    """max_tokens 1: the token comes from the prefill's own logits, so nothing is decoded."""
    sampler = make_sampler(base)
    before = base.num_forwards
    run_all(sampler, [sample(f"r{i}", prompt(i, 30), max_tokens=1, prompt_logprobs=True) for i in range(6)])
    assert base.num_forwards == before + 1
