"""Temperature, top-k, top-p, greedy; each row for itself."""

import numpy as np
import pytest
import torch

from tinsmith.sampling.logits import Warp, draw, draw_many, penalise, truncate
from tinsmith.sampling.scores import likeliest
from tinsmith.types import SamplingParams

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one(logits: list[float], uniform: float = 0.5, **params: float) -> tuple[int, float]:
    warp = Warp.of([SamplingParams(**params)], len(logits), CPU)
    tokens, logprobs, _ = draw(torch.tensor([logits]), warp, torch.tensor([uniform], dtype=torch.float64))
    return int(tokens[0]), float(logprobs[0])


def kept(probs: list[float], k: int, p: float, min_p: float = 0.0) -> list[int]:
    top_p = torch.tensor([[p]], dtype=torch.float64)
    rows = truncate(torch.tensor([probs]), torch.tensor([[k]]), top_p, torch.tensor([[min_p]]))
    assert all(float(q) in (0.0, pytest.approx(orig)) for q, orig in zip(rows[0], probs, strict=True))
    return torch.nonzero(rows[0])[:, 0].tolist()


def test_the_uniform_number_chooses_by_cumulative_probability():
    logits = np.log([0.1, 0.2, 0.3, 0.4]).tolist()
    assert [one(logits, u)[0] for u in (0.0, 0.099, 0.101, 0.299, 0.301, 0.599, 0.601, 1 - 2**-52)] == [
        0, 0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert one(logits, 0.5)[1] == pytest.approx(np.log(0.3), abs=1e-6)


@pytest.mark.parametrize("vocab", [5, 1024, 1025, 5000])
def test_the_running_sum_is_inverted_across_pieces(vocab):
    """Against the plain running sum in double precision; a draw on the very edge may fall to either side."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(400, vocab, generator=generator) * 2
    uniforms = torch.rand(400, dtype=torch.float64, generator=generator)
    tokens, _, _ = draw(logits, Warp.of([SamplingParams()] * 400, vocab, CPU), uniforms)
    running = torch.softmax(logits.double(), -1).cumsum(-1)
    above = running.gather(1, tokens[:, None])[:, 0]
    below = torch.where(tokens > 0, running.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert bool((above > uniforms - 1e-6).all())
    assert bool((below <= uniforms + 1e-6).all())
    assert (tokens == torch.searchsorted(running, uniforms[:, None], right=True)[:, 0]).double().mean() > 0.99


@pytest.mark.parametrize("at", [0, 1023, 1024, 2999])
def test_whatever_the_number_a_lone_token_is_drawn(at):
    logits = torch.full((3, 3000), float("-inf"))
    logits[:, at] = 1.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-52], dtype=torch.float64)
    tokens, logprobs, _ = draw(logits, Warp.of([SamplingParams()] * 3, 3000, CPU), uniforms)
    assert tokens.tolist() == [at] * 3
    assert logprobs.tolist() == [0.0] * 3


def test_a_token_without_probability_is_never_drawn():
    inf = float("-inf")
    assert one([inf, 0.0, inf, 0.0, inf], 0.0)[0] == 1
    assert one([inf, 0.0, inf, 0.0, inf], 1 - 2**-52)[0] == 3


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logprobs_are_at_the_temperature(temperature):
    logits = [0.3, -1.0, 2.0]
    expected = torch.log_softmax(torch.tensor(logits) / temperature, 0)
    token, logprob = one(logits, 0.1, temperature=temperature)
    assert logprob == pytest.approx(float(expected[token]), abs=1e-6)


def test_greedy_takes_the_largest_and_reports_temperature_one():
    logits = [0.3, 2.0, 2.0, -1.0]
    assert one(logits, 0.99, temperature=0.0, top_k=1)[0] == 1
    assert one(logits, temperature=0.0)[1] == pytest.approx(float(torch.log_softmax(torch.tensor(logits), 0)[1]))


def test_a_tiny_temperature_is_no_overflow():
    assert one([1.0, 3.0, 2.0], 0.9, temperature=1e-30) == (1, 0.0)


def test_truncation_changes_what_is_drawn_but_not_the_logprob():
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    token, logprob = one(logits, 0.9, top_k=2)
    assert token == 1
    assert logprob == pytest.approx(np.log(0.3), abs=1e-6)


@pytest.mark.parametrize(
    ("k", "p", "expected"),
    [
        (9, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        (1, 1.0, [1]),
        (9, 0.4, [1]),
        (9, 0.41, [1, 3]),
        (9, 0.8, [1, 2, 3]),
        (9, 1e-9, [1]),
        (2, 0.6, [1, 3]),
        (2, 0.5, [1]),
    ],
)
def test_top_k_then_top_p(k, p, expected):
    assert kept([0.125, 0.40625, 0.15625, 0.3125], k, p) == expected


def test_of_equal_tokens_the_lower_ids_are_kept():
    assert kept([0.25, 0.25, 0.25, 0.25], 2, 1.0) == [0, 1]
    assert kept([0.25, 0.25, 0.25, 0.25], 9, 0.5) == [0, 1]


def test_logits_that_are_not_finite_show():
    assert np.isnan(one([0.0, float("nan"), 1.0])[1])
    assert np.isnan(one([0.0, float("inf"), 1.0])[1])


@pytest.mark.parametrize("vocab", [7, 211, 1024, 4001])
def test_a_row_among_others_has_the_bits_of_one_alone(vocab):
    """Whether all are drawn for at once, or in blocks, as with the largest vocabulary."""
    params = [
        SamplingParams(temperature=(1.0, 0.0, 0.7)[i % 3], top_k=(-1, 3)[i % 2], top_p=(1.0, 0.9)[i % 5 == 0])
        for i in range(77)
    ]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(77, vocab, generator=generator) * 3
    uniforms = torch.rand(77, dtype=torch.float64, generator=generator)
    warp = Warp.of(params, vocab, CPU)
    tokens, logprobs, norms = draw(logits, warp, uniforms)
    all_logprobs = warp.scaled(logits) - norms
    torch.testing.assert_close(all_logprobs, torch.log_softmax(warp.scaled(logits), -1), atol=5e-6, rtol=0)
    for i in range(77):
        token, logprob, _ = draw(logits[i : i + 1], Warp.of(params[i : i + 1], vocab, CPU), uniforms[i : i + 1])
        assert torch.equal(token[0], tokens[i])
        assert torch.equal(logprob[0], logprobs[i])
        assert torch.equal(logprob[0], all_logprobs[i, tokens[i]])


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    probs = [0.05, 0.4, 0.2, 0.31, 0.04]
    assert kept(probs, 5, 1.0, 0.5) == [1, 2, 3]
    assert kept(probs, 5, 1.0, 0.51) == [1, 3]
    assert kept(probs, 5, 1.0, 1.0) == [1]
    assert kept(probs, 5, 1.0, 0.0) == [0, 1, 2, 3, 4]
    logits = np.log(probs).tolist()
    assert {one(logits, u, min_p=0.5)[0] for u in np.linspace(0, 0.999, 50)} == {1, 2, 3}
    assert one(logits, 0.0, min_p=1.0)[1] == pytest.approx(np.log(0.4), abs=1e-6)


def test_penalties_count_what_was_sampled_and_leave_logprobs_alone():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=0.5)]
    penalised = penalise(logits, params, [[3, 3, 3], [3, 2, 3]])
    assert penalised is not None
    assert penalised.tolist() == [[1, 2, 3, 4], [1, 2, 1, 1.5]]
    warp = Warp.of(params, 4, CPU)
    tokens, logprobs, _ = draw(logits, warp, torch.zeros(2, dtype=torch.float64), penalised)
    assert tokens.tolist() == [3, 1]
    assert logprobs.tolist() == pytest.approx(torch.log_softmax(logits, -1)[[0, 1], [3, 1]].tolist())
    assert penalise(logits, params[:1] * 2, [[3], [3]]) is None


def test_many_draws_a_row_invert_the_distribution_at_the_temperature():
    probs = torch.tensor([[0.125, 0.25, 0.625], [0.5, 0.5, 0.0]])
    uniforms = torch.tensor([[0.0, 0.2, 0.9], [0.49, 0.5, 0.99]], dtype=torch.float64)
    assert draw_many(probs.log(), 1.0, uniforms).tolist() == [[0, 1, 2], [0, 1, 1]]
    assert draw_many(probs.log() * 0.5, 0.5, uniforms).tolist() == [[0, 1, 2], [0, 1, 1]]
    assert draw_many(probs.log(), 0.0, uniforms).tolist() == [[2, 2, 2], [0, 0, 0]]


def test_the_likeliest_of_a_row_do_not_depend_on_what_others_ask_for():
    logprobs = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 0.0], [1.0, 3.0, 2.0]]), -1)
    first, none, last = likeliest(logprobs, [2, 0, 1])
    assert none is None
    assert first[0].tolist() == [2, 1]
    assert first[0].dtype == np.int32
    np.testing.assert_array_equal(first[1], logprobs[0, [2, 1]].numpy())
    assert last[0].tolist() == [1]


@pytest.mark.parametrize("top_k", [4, 2**31, 2**63, 10**400])
def test_a_top_k_beyond_the_vocabulary_keeps_it_all(top_k):
    logits = np.log([0.1, 0.2, 0.3, 0.4]).tolist()
    for uniform in (0.05, 0.2, 0.5, 0.95):
        assert one(logits, uniform, top_k=top_k) == one(logits, uniform)


def test_the_likeliest_hold_no_more_memory_than_they_need():
    """They stay until their request has ended; a view would hold what all rows of its step asked for."""
    for ids, logprobs in likeliest(torch.randn(8, 4096), [3] * 8):
        assert ids.base is None
        assert logprobs.base is None
        assert (ids.nbytes, logprobs.nbytes) == (12, 12)
