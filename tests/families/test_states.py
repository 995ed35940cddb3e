"""Layers that keep a state, beyond the battery: the rule itself, and what becomes of states in the sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.families.configs import VOCAB
from tests.numerics.lab import datum, item, make_trainer, relative, run_pass, spec
from tests.numerics.sampling_lab import Letters, assert_same_sample, prompt, run_all, sample, state_of, with_blocks
from tinsmith.config import Settings
from tinsmith.model import BaseModel
from tinsmith.model.delta import Chunks, DeltaKind, LayerState, go_on, mix
from tinsmith.model.norm import RMSNorm
from tinsmith.model.peak import PeakMeter
from tinsmith.sampling import Sampler
from tinsmith.sampling.states import PromptStates
from tinsmith.types import Datum

LENGTHS = (1, 63, 64, 65, 150, 7)
KIND = DeltaKind(torch.randn(2 * 16 + 36, 4, generator=torch.Generator().manual_seed(1)), 2, 3 * 2, 8, 6)
BOUND = 1e-5


def inputs(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num)
    mixed = torch.randn(num, KIND.taps_CK.shape[0], generator=generator)
    g = -torch.rand(num, KIND.heads, generator=generator)
    return [mixed, g, torch.rand(num, KIND.heads, generator=generator)]


def written_out(mixed: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """One sequence, token after token, in float64."""
    taps = KIND.taps_CK.double()
    wide = torch.cat([mixed.new_zeros(3, mixed.shape[1]), mixed])
    x = sum(taps[:, tap] * wide[tap : tap + len(mixed)] for tap in range(4))
    assert isinstance(x, Tensor)
    x = x * x.sigmoid()
    q, k, v = x[:, :16].view(-1, 2, 8), x[:, 16:32].view(-1, 2, 8), x[:, 32:].view(-1, 6, 6)
    q, k = ((y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(3, 1) for y in (q, k))
    state, outs = mixed.new_zeros(6, 8, 6), []
    for t in range(len(mixed)):
        state = state * g[t].exp()[:, None, None]
        news = beta[t][:, None] * (v[t] - torch.einsum("hde,hd->he", state, k[t]))
        state = state + torch.einsum("hd,he->hde", k[t], news)
        outs.append(torch.einsum("hde,hd->he", state, q[t]) * 8**-0.5)
    return torch.stack(outs)


def test_the_rule_is_the_recurrence_and_never_crosses_a_border() -> None:
    """Values and gradients, with rows after the last sequence."""
    ours = [x.requires_grad_() for x in inputs(sum(LENGTHS) + 5)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    out = mix(*ours, KIND, Chunks([(length, 0) for length in LENGTHS], torch.device("cpu")))
    parts = zip(*(x[: sum(LENGTHS)].split(LENGTHS) for x in exact), strict=True)
    expected = torch.cat([written_out(*part) for part in parts])
    torch.testing.assert_close(out[:-5].double(), expected, rtol=0, atol=3e-6)
    assert not out[-5:].any()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(out, ours, dout)
    for one, other in zip(found, torch.autograd.grad(expected, exact, dout[:-5].double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_no_digits_are_lost_where_an_outcome_nearly_vanishes(seed: int) -> None:
    """A first outcome is the value times the product of query and key, and then brought to length one: near a product
    of zero, gradients are a hundred times those of other rows. From the same float32 inputs, all of them are as exact
    as inputs of that many digits allow."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (1, 1, 1, 1, 40, 66, 7)
    num = sum(lengths)
    mixed = torch.randn(num, KIND.taps_CK.shape[0], generator=generator) * 0.3
    g, beta = -torch.rand(num, KIND.heads, generator=generator) / 2, torch.rand(num, KIND.heads, generator=generator)
    ours = [x.requires_grad_() for x in (mixed, g, beta)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    chunks = Chunks([(length, 0) for length in lengths], torch.device("cpu"))
    out = RMSNorm(torch.ones(KIND.value_size), 1e-6)(mix(*ours, KIND, chunks))
    raw = torch.cat([written_out(*part) for part in zip(*(x.split(lengths) for x in exact), strict=True)])
    squares = raw.square().mean(-1, keepdim=True)
    expected = raw * (squares + 1e-6).rsqrt()
    assert squares.min().sqrt() < 1e-2 * squares.median().sqrt()
    dout = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, ours, dout)
    for one, other in zip(found, torch.autograd.grad(expected, exact, dout.double()), strict=True):
        assert relative(one.numpy(), other) < 3e-6


@pytest.mark.parametrize("cut", [1, 50, 64, 100, 128, 149])
def test_a_sequence_goes_on_from_its_state(cut: int) -> None:
    """And what was kept on the way is what a sequence of that length ends with."""
    given = inputs(150)
    whole = mix(*given, KIND, Chunks([(150, 0)], torch.device("cpu")))
    none = LayerState(torch.zeros(4, given[0].shape[1]), torch.zeros(6, 8, 6))

    def part(start: int, end: int, state: LayerState, wanted: list[int]) -> Any:
        chunks = Chunks([(end - start, start)], torch.device("cpu"))
        return go_on(*(x[start:end] for x in given), KIND, chunks, [state], [wanted])

    first, ends = part(0, cut, none, [])
    second, later = part(cut, 150, ends.states[0], [128] if cut < 128 else [])
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=3e-6)
    for position, kept in later.kept[0].items():
        _, at = part(0, position, none, [])
        torch.testing.assert_close(kept.state_HDE, at.states[0].state_HDE, rtol=0, atol=3e-6)
        assert torch.equal(kept.rows_KC, at.states[0].rows_KC)
    assert len(later.kept[0]) == (cut < 128)


def test_states_are_kept_on_the_grid_as_often_as_the_stride_says() -> None:
    def wanted(grid: int, stride: int, start: int, end: int) -> list[int]:
        return PromptStates({}, torch.device("cpu"), grid, stride).wanted(start, end)

    assert wanted(64, 1, 0, 200) == [64, 128, 192]
    assert wanted(64, 3, 64, 600) == [192, 384, 576]
    assert wanted(64, 3, 64, 1000) == [192, 384, 576, 768, 960]
    assert wanted(64, 100, 0, 1000) == [960]
    assert wanted(64, 1, 0, 64) == wanted(0, 1, 0, 500) == []


def sampler_of(base: BaseModel, is_paged: bool = False, **settings: Any) -> Sampler:
    sampler = Sampler(base, Settings(**settings), Letters(), is_paged=is_paged)
    sampler.add_adapter("a", state_of(base, spec("a")))
    return sampler


def logprobs_of(result: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([sequence.logprobs for sequence in result.sequences])


@pytest.mark.parametrize("is_paged", [False, True])
def test_samples_of_a_prompt_begin_with_copies_of_its_states(make_base, is_paged: bool) -> None:
    """Each has the trainer's log-probabilities, in either layout of memory."""
    base = make_base("qwen3_next")
    request = sample("r", prompt(1, 100, VOCAB), "a", num_samples=3, max_tokens=40)
    result = run_all(sampler_of(base, is_paged), [request])["r"]
    assert len({tuple(sequence.tokens) for sequence in result.sequences}) == 3
    trainer = make_trainer(base, deterministic=False)
    trainer.import_run(spec("a"), state_of(base, spec("a")))
    for sequence in result.sequences:
        tokens = np.concatenate([request.prompt, sequence.tokens])
        whole = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
        (forward,) = run_pass(trainer, [item("a", [whole], backward=False)])
        np.testing.assert_allclose(sequence.logprobs, forward.logprobs[0][99:], rtol=0, atol=BOUND)


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_prompt_that_begins_alike_goes_on_from_kept_states(make_base, is_paged: bool) -> None:
    base = make_base("qwen3_5")
    start = prompt(1, 200, VOCAB)
    items = [
        sample("same", start, "a", max_tokens=9),
        sample("longer", np.concatenate([start, prompt(2, 70, VOCAB)]), "a", max_tokens=9),
        sample("other", np.concatenate([start[:150], prompt(3, 30, VOCAB)]), "a", max_tokens=9),
        sample("early", np.concatenate([start[:60], prompt(4, 30, VOCAB)]), "a", max_tokens=9),
    ]
    sampler = sampler_of(base, is_paged)
    run_all(sampler, [sample("first", start, "a", max_tokens=3)])
    for request, cached in zip(items, (192, 192, 128, 0), strict=True):
        (found,) = run_all(sampler, [request]).values()
        (alone,) = run_all(sampler_of(base, is_paged, prefix_cache_mib=0), [request]).values()
        assert (found.prompt_cache_hit_tokens, alone.prompt_cache_hit_tokens) == (cached, 0)
        np.testing.assert_array_equal(found.sequences[0].tokens, alone.sequences[0].tokens)
        np.testing.assert_allclose(logprobs_of(found), logprobs_of(alone), rtol=0, atol=BOUND)


def test_what_is_found_is_what_was_computed_in_deterministic_mode(make_base) -> None:
    base = make_base("qwen3_next", deterministic=True)
    sampler = sampler_of(base, deterministic=True, prefill_chunk_tokens=64)
    first, again = (
        run_all(sampler, [sample("r", prompt(1, 200, VOCAB), "a", max_tokens=20, prompt_logprobs=False)])["r"]
        for _ in range(2)
    )
    assert again.prompt_cache_hit_tokens == 192
    assert_same_sample(first, again)


def test_what_gave_its_memory_back_comes_to_the_same(make_base) -> None:
    base = make_base("qwen3_5")
    items = [sample(f"r{i}", prompt(i, 50 + 9 * i, VOCAB), "a", num_samples=2, max_tokens=50) for i in range(3)]
    results = {}
    for total in (14, 400):
        sampler = with_blocks(base, total, 10, prefix_cache_mib=0)
        sampler.add_adapter("a", state_of(base, spec("a")))
        results[total] = run_all(sampler, items)
        assert (sampler.preemptions.num_preempted > 0) == (total == 14)
        assert sampler.memory.num_held_blocks == 0
    for request in items:
        few, many = (results[total][request.op_id] for total in (14, 400))
        np.testing.assert_array_equal(few.sequences[1].tokens, many.sequences[1].tokens)
        np.testing.assert_allclose(logprobs_of(few), logprobs_of(many), rtol=0, atol=BOUND)


def test_a_sequence_that_starts_again_comes_to_the_same_bits(make_base) -> None:
    base = make_base("qwen3_5", deterministic=True)
    items = [sample(f"r{i}", prompt(i, 60, VOCAB), "a", max_tokens=15) for i in range(3)]
    few = 3 * (1 + with_blocks(base, 9).memory.kv.shape.state_blocks) + 1  # all begin, and one at a time may grow
    results = {}
    for total in (few, 400):
        sampler = with_blocks(base, total, few, deterministic=True)
        sampler.add_adapter("a", state_of(base, spec("a")))
        results[total] = run_all(sampler, items)
        assert (sampler.preemptions.num_preempted > 0) == (total == few)
    for request in items:
        assert_same_sample(results[few][request.op_id], results[400][request.op_id])


def test_a_step_that_fails_half_way_is_repeated_without_a_trace(make_base, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("qwen3_next")
    items = [sample("r0", prompt(1, 20, VOCAB), "a", max_tokens=20), sample("r1", prompt(2, 90, VOCAB), max_tokens=9)]
    calm = run_all(sampler_of(base), items)
    sampler = sampler_of(base)
    sampler.submit(items[0])
    for _ in range(5):
        sampler.step()
    layer = base.backbone.layers[2]
    forward, failures = layer.forward, iter([True])

    def fails_once(*args: Any, **given: Any) -> Any:
        out = forward(*args, **given)
        if next(failures, False):
            raise RuntimeError("on purpose")
        return out

    monkeypatch.setattr(layer, "forward", fails_once)
    results = run_all(sampler, items[1:])
    assert next(failures, None) is None
    for name in ("r0", "r1"):
        np.testing.assert_array_equal(results[name].sequences[0].tokens, calm[name].sequences[0].tokens)
        np.testing.assert_allclose(logprobs_of(results[name]), logprobs_of(calm[name]), rtol=0, atol=BOUND)


def test_memory_for_states_is_counted(make_base) -> None:
    base = make_base("qwen3_next")
    sampler = with_blocks(base, 400)
    shape = sampler.memory.kv.shape
    states = sum(one.num_bytes for one in shape.states.values())
    assert sorted(shape.states) == [0, 2]
    assert states <= shape.state_blocks * shape.block_bytes < states + shape.block_bytes
    sampler.submit(sample("r", prompt(1, 100, VOCAB), num_samples=3, max_tokens=20))
    for _ in range(4):
        sampler.step()
    assert sampler.memory.num_held_blocks == 3 * (2 + shape.state_blocks)
    sampler.cancel(next(iter(sampler._requests)))
    assert sampler.memory.num_held_blocks == 0


def test_memory_of_training_is_linear_in_the_tokens(make_base) -> None:
    base = make_base("qwen3_5")
    rng = np.random.default_rng(0)
    peaks = []
    for length in (64, 256, 448):
        trainer = make_trainer(base, spec("a"), deterministic=False)
        items = [item("a", [datum(rng, length)])]
        meter = PeakMeter()
        with meter:
            run_pass(trainer, items)
        peaks.append(meter.peak)
    assert peaks[2] - peaks[1] <= 1.1 * (peaks[1] - peaks[0])
