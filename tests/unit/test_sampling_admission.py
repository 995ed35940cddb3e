"""Prompts are cut on their own grid, taken in order, and at most a chunk's worth of tokens a step."""

import numpy as np

from tinsmith.sampling.admission import next_chunk, plan_prefill
from tinsmith.sampling.rng import streams
from tinsmith.sampling.scores import PromptScores
from tinsmith.sampling.sequence import Request, Sequence
from tinsmith.sampling.stop import StopRule
from tinsmith.types import OpId, SampleItem, SamplingParams


class NoText:
    def decode(self, ids):
        return ""


def request(length: int, prefilled: int = 0, num_samples: int = 1, max_tokens: int = 10) -> Request:
    item = SampleItem(OpId("r"), None, np.zeros(length, np.int32), SamplingParams(), num_samples, 0)
    stop = StopRule(frozenset(), (), NoText())
    return Request(item, None, stop, max_tokens, streams(0, num_samples), PromptScores(item), num_prefilled=prefilled)


def plan(begun, waiting, chunk=100, may_begin=lambda _: True):
    return [(c.prompt, c.start, c.end) for c in plan_prefill([*begun, *waiting], begun, chunk, may_begin)]


def test_a_long_prompt_goes_on_at_multiples_of_the_chunk():
    assert [next_chunk(request(250, at), 100).end for at in (0, 100, 200)] == [100, 200, 250]
    assert next_chunk(request(250, 200), 100).is_last


def test_short_prompts_share_a_step_in_their_order():
    a, b, c, d = request(40), request(50), request(20), request(5)
    assert plan([], [a, b, c, d]) == [(a, 0, 40), (b, 0, 50)]


def test_what_has_begun_goes_first():
    a, b = request(130, prefilled=100), request(60)
    assert plan([a], [b]) == [(a, 100, 130), (b, 0, 60)]
    assert plan([request(300, prefilled=100)], [b])[0][1:] == (100, 200)
    assert len(plan([request(300, prefilled=100)], [b])) == 1


def test_one_that_may_not_begin_holds_back_those_behind_it():
    a, b, asked = request(10), request(5), []
    assert plan([], [a, b], may_begin=asked.append) == []
    assert asked == [a]


def test_permission_is_asked_only_where_it_is_used():
    a, b, asked = request(90), request(20), []
    plan([], [a, b], may_begin=lambda r: asked.append(r) or True)
    assert asked == [a]


def test_what_a_request_holds_besides_its_sequences():
    one, group = request(100, max_tokens=100), request(64, num_samples=3, max_tokens=1)
    assert (one.prompt_blocks, group.prompt_blocks) == (2, 1)
    one.num_started, group.num_started = 1, 2
    assert (one.prompt_blocks, group.prompt_blocks) == (None, 1)


def test_what_starts_again_keeps_its_first_token():
    sequence = Sequence(request(64), 0, tokens=[5, 6, 7], logprobs=[-1.0, -2.0, -3.0], tops=[([1], [0.0])] * 3)
    sequence.start_again()
    assert (sequence.tokens, sequence.logprobs, len(sequence.tops)) == ([5], [-1.0], 1)
    assert sequence.pending == (5, 64)


def test_when_a_sequence_must_grow():
    sequence = Sequence(request(64), 0, tokens=[1], num_blocks=1)
    assert sequence.num_kv == 64
    assert sequence.must_grow
    assert sequence.pending == (1, 64)
    sequence.num_blocks = 2
    assert not sequence.must_grow
    sequence.tokens = [5] * 64 + [6]
    assert sequence.must_grow
    assert sequence.pending == (6, 128)
