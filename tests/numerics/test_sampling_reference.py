"""The sampler's logprobs are those of transformers with peft and of the trainer; greedy is transformers' greedy."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.numerics.lab import VOCAB, PeftTwin, item, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import RANKS, make_sampler, mixed_states, prompt, run_all, sample, state_of
from tinsmith.types import Datum

LENGTHS = (1, 3, 20, 64, 90, 31)
TOLERANCE = 1e-5


def full_logprobs(model: torch.nn.Module, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[N, V] of a reference model."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    return (logits / temperature).log_softmax(-1).numpy()


def plain_model(base) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base.info.path, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_transformers_and_peft(base, temperature):
    states = mixed_states(base, 8)
    items = [
        sample(f"r{i}", prompt(i, LENGTHS[i % 6]), f"a{i % 8}", seed=i, max_tokens=70, temperature=temperature)
        for i in range(12)
    ]
    results = run_all(make_sampler(base, states), items)
    twins = {key: PeftTwin(base, state) for key, state in states.items()}
    for request in items:
        sequence = results[request.op_id].sequences[0]
        tokens = np.concatenate([request.prompt, sequence.tokens])
        reference = full_logprobs(twins[request.adapter].model, tokens, temperature)
        rows = np.arange(len(request.prompt) - 1, len(tokens) - 1)
        np.testing.assert_allclose(sequence.logprobs, reference[rows, sequence.tokens], atol=TOLERANCE, rtol=0)


def test_logprobs_are_those_of_the_trainer(base):
    states = {f"run{i}": state_of(base, spec(f"run{i}", RANKS[i], seed=i + 1)) for i in range(4)}
    trainer = make_trainer(base)
    for state in states.values():
        trainer.import_run(state.spec, state)
    items = [
        sample(f"r{i}", prompt(i, LENGTHS[i % 6]), f"run{i % 4}", seed=i, max_tokens=50, prompt_logprobs=True)
        for i in range(8)
    ]
    results = run_all(make_sampler(base, states), items)
    data = []
    for request in items:
        tokens = np.concatenate([request.prompt, results[request.op_id].sequences[0].tokens])
        data.append(Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)}))
    forwards = [item(f"run{i % 4}", [d], seq=i, backward=False) for i, d in enumerate(data)]
    for request, forward in zip(items, run_pass(trainer, forwards), strict=True):
        result = results[request.op_id]
        sampled = np.concatenate([result.prompt_logprobs[1:], result.sequences[0].logprobs])
        np.testing.assert_allclose(sampled, forward.logprobs[0], atol=TOLERANCE, rtol=0)


def test_prompt_logprobs_and_their_top_k(base):
    states = mixed_states(base, 1)
    request = sample("r", prompt(5, 90), "a0", max_tokens=1, prompt_logprobs=True, topk=5)
    sampler = make_sampler(base, states)
    before = base.num_forwards
    result = run_all(sampler, [request])["r"]
    assert base.num_forwards == before + 1
    reference = full_logprobs(PeftTwin(base, states["a0"]).model, request.prompt)
    assert result.prompt_logprobs.dtype == np.float32
    assert np.isnan(result.prompt_logprobs[0])
    expected = reference[np.arange(89), request.prompt[1:]]
    np.testing.assert_allclose(result.prompt_logprobs[1:], expected, atol=TOLERANCE, rtol=0)
    assert result.topk_prompt_tokens.shape == result.topk_prompt_logprobs.shape == (90, 5)
    assert result.topk_prompt_tokens.dtype == np.int32
    assert (result.topk_prompt_tokens[0] == 0).all()
    assert (result.topk_prompt_logprobs[0] == -99999.0).all()
    order = np.argsort(-reference[:89], axis=1)[:, :5]
    expected = np.take_along_axis(reference[:89], order, axis=1)
    np.testing.assert_allclose(result.topk_prompt_logprobs[1:], expected, atol=TOLERANCE, rtol=0)
    assert (result.topk_prompt_tokens[1:] == order).mean() > 0.99


def test_a_prompt_in_chunks_gives_the_numbers_of_the_whole(base):
    states = mixed_states(base, 1)
    request = sample("r", prompt(6, 400), "a0", max_tokens=30, prompt_logprobs=True)
    whole = run_all(make_sampler(base, states), [request])["r"]
    for chunk_tokens in (7, 64, 399):
        cut = run_all(make_sampler(base, states, prefill_chunk_tokens=chunk_tokens), [request])["r"]
        np.testing.assert_allclose(cut.prompt_logprobs, whole.prompt_logprobs, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(cut.sequences[0].tokens, whole.sequences[0].tokens)
        np.testing.assert_allclose(cut.sequences[0].logprobs, whole.sequences[0].logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, 40])
def test_greedy_is_the_greedy_of_transformers(base, length):
    ids = prompt(7, length)
    result = run_all(make_sampler(base), [sample("r", ids, max_tokens=80, temperature=0.0)])["r"]
    model = plain_model(base)
    expected = model.generate(torch.from_numpy(ids)[None], max_new_tokens=80, do_sample=False, pad_token_id=0)
    tokens = result.sequences[0].tokens
    np.testing.assert_array_equal(tokens, expected[0, length:].numpy())
    reference = full_logprobs(model, np.concatenate([ids, tokens]))[length - 1 : -1]
    np.testing.assert_allclose(result.sequences[0].logprobs, reference.max(-1), atol=TOLERANCE, rtol=0)


def test_an_adapter_with_b_zero_is_the_base(base):
    states = {"zero": state_of(base, spec("zero", 16), spread=0.0)}
    items = [
        sample("base", prompt(8, 30), seed=1, max_tokens=30),
        sample("zero", prompt(8, 30), "zero", seed=1, max_tokens=30),
    ]
    results = run_all(make_sampler(base, states), items)
    np.testing.assert_array_equal(results["base"].sequences[0].tokens, results["zero"].sequences[0].tokens)
    np.testing.assert_array_equal(results["base"].sequences[0].logprobs, results["zero"].sequences[0].logprobs)


def test_a_snapshot_keeps_its_own_weights(base):
    state = state_of(base, spec("run", 8))
    sampler = make_sampler(base, {"v1": state}, deterministic=True)
    request = sample("before", prompt(9, 20), "v1", max_tokens=20)
    sampler.submit(request)
    for _ in range(5):
        sampler.step()
    untouched = run_all(make_sampler(base, {"v1": state}, deterministic=True), [request])["before"]
    for tensor in state.tensors.values():
        tensor *= -3
    sampler.add_adapter("v2", state)
    after = run_all(
        sampler,
        [sample("after", prompt(9, 20), "v1", max_tokens=20), sample("new", prompt(9, 20), "v2", max_tokens=20)],
    )
    for name in ("before", "after"):
        np.testing.assert_array_equal(after[name].sequences[0].tokens, untouched.sequences[0].tokens)
        np.testing.assert_array_equal(after[name].sequences[0].logprobs, untouched.sequences[0].logprobs)
    assert (after["new"].sequences[0].logprobs != untouched.sequences[0].logprobs).any()


def test_tokens_are_drawn_from_the_distribution_at_the_requests_temperature(base):
    count = 4000
    ids = prompt(10, 12)
    reference = np.exp(full_logprobs(plain_model(base), ids, temperature=0.5)[-1].astype(np.float64))
    result = run_all(make_sampler(base), [sample("r", ids, num_samples=count, max_tokens=1, temperature=0.5)])["r"]
    drawn = np.bincount([s.tokens[0] for s in result.sequences], minlength=VOCAB)
    likely = reference > 5 / count
    chi2 = ((drawn - count * reference) ** 2 / (count * reference))[likely].sum()
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum())
    assert drawn[~likely].sum() == pytest.approx(count * reference[~likely].sum(), abs=5 * np.sqrt(count))


def test_top_k_and_top_p_choose_among_the_likely_alone(base):
    ids = prompt(11, 12)
    order = np.argsort(-full_logprobs(plain_model(base), ids)[-1])
    probs = np.exp(full_logprobs(plain_model(base), ids)[-1][order])
    nucleus = int((np.cumsum(probs) - probs < 0.5).sum())
    items = [
        sample("k", ids, num_samples=500, max_tokens=1, top_k=5),
        sample("p", ids, num_samples=3000, max_tokens=1, top_p=0.5),
        sample("one", ids, num_samples=20, max_tokens=1, top_p=1e-9),
    ]
    results = run_all(make_sampler(base), items)
    assert {int(s.tokens[0]) for s in results["k"].sequences} == set(order[:5].tolist())
    assert {int(s.tokens[0]) for s in results["p"].sequences} <= set(order[:nucleus].tolist())
    assert {int(s.tokens[0]) for s in results["one"].sequences} == {int(order[0])}
    for sequence in results["k"].sequences:
        rank = order.tolist().index(int(sequence.tokens[0]))
        assert sequence.logprobs[0] == pytest.approx(np.log(probs[rank]), abs=TOLERANCE)
