"""What a step computes is one walk over the base; its short ways give the numbers of the long ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from tests.numerics.lab import CONFIGS, make_base
from tests.numerics.sampling_lab import assert_same_sample, make_sampler, mixed_states, prompt, run_all, sample
from tinsmith.sampling import kv
from tinsmith.sampling.layers import lean_layers
from tinsmith.sampling.lora import DecodeLora
from tinsmith.types import SampleResult

TOLERANCE = 1e-5


def assert_like(found: SampleResult, expected: SampleResult) -> None:
    for one, other in zip(found.sequences, expected.sequences, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE, rtol=0)


def test_a_prompt_comes_in_on_the_walk_that_decodes(base):
    """A prompt of four chunks: four walks, in each of which the others get a token."""
    states = mixed_states(base, 2)
    sampler = make_sampler(base, states, prefill_chunk_tokens=64)
    first = sample("first", prompt(1, 10), "a0", max_tokens=40)
    late = sample("late", prompt(2, 250), "a1", max_tokens=3)
    sampler.submit(first)
    sampler.step()
    sampler.submit(late)
    before = base.num_forwards
    for step in range(4):
        sampler.step()
        assert base.num_forwards == before + step + 1
        (running,) = [s for s in sampler._stages.running if s.request.item.op_id == "first"]
        assert len(running.tokens) == 2 + step
    results = run_all(sampler)
    for item in (first, late):
        alone = make_sampler(base, states, prefill_chunk_tokens=64)
        assert_like(results[item.op_id], run_all(alone, [item])[item.op_id])


def test_mixed_rows_have_the_bits_of_rows_by_themselves(base):
    states = mixed_states(base, 3)
    items = [sample(f"r{i}", prompt(i, 90), f"a{i % 3}", seed=i, max_tokens=12 + i) for i in range(6)]
    sampler = make_sampler(base, states, prefill_chunk_tokens=32, deterministic=True)
    results: dict[str, Any] = {}
    for item in items:
        sampler.submit(item)
        results.update(sampler.step())
    results.update(run_all(sampler))
    for item in items:
        alone = make_sampler(base, states, prefill_chunk_tokens=32, deterministic=True)
        assert_same_sample(results[item.op_id], run_all(alone, [item])[item.op_id])


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_long_sequences_share_wide_slots(base, monkeypatch, is_deterministic):
    """From the second block on slots are wider than what is in them; what attention reads doesn't show it."""
    states = mixed_states(base, 2)
    items = [sample(f"r{i}", prompt(i, 40 + 30 * i), f"a{i % 2}", seed=i, max_tokens=150 + 10 * i) for i in range(4)]
    expected = run_all(make_sampler(base, states, deterministic=is_deterministic), items)
    monkeypatch.setattr(kv, "LONG_BLOCKS", 1)
    sampler = make_sampler(base, states, deterministic=is_deterministic)
    moves: list[int] = []
    move = sampler.memory.kv.move
    monkeypatch.setattr(
        sampler.memory.kv, "move", lambda owner, size, new, num: (moves.append(new), move(owner, size, new, num))
    )
    results = run_all(sampler, items)
    for item in items:
        check = assert_same_sample if is_deterministic else assert_like
        check(results[item.op_id], expected[item.op_id])
    assert moves


def test_a_long_sequence_is_copied_a_few_times():
    size, copies = 1, 0
    total = 0
    while size < 512:
        grown = kv.wider(size + 1)
        copies += size > kv.LONG_BLOCKS
        total += size if size > kv.LONG_BLOCKS else 0
        size = grown
    assert copies <= 16
    assert total <= 5 * 512


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_lean_layers_give_the_models_own_numbers(kind, tmp_path):
    made = make_base(kind, tmp_path)
    lean = lean_layers(made)
    assert lean is not None
    assert made.num_forwards == 0


def test_a_model_with_other_parts_is_walked_through_its_modules(tmp_path, monkeypatch):
    made = make_base("qwen3", tmp_path)
    item = sample("r", prompt(1, 30), max_tokens=8)
    expected = run_all(make_sampler(made), [item])["r"]
    layer = made.backbone.layers[0]
    layer.extra = torch.nn.Identity()
    assert lean_layers(made) is None
    assert_like(run_all(make_sampler(made), [item])["r"], expected)
    del layer.extra
    forward = type(layer.mlp).forward
    monkeypatch.setattr(type(layer.mlp), "forward", lambda self, x: 1.01 * forward(self, x))
    assert lean_layers(made) is None  # the same parts, put together otherwise


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("owners", [(0, 0, 0), (0, 1, 2), (1, None, 0, 1), (2, None), (None, None), (1,)])
def test_adapters_of_a_batch_are_those_of_each_row(base, is_exact, owners):
    sampler = make_sampler(base, mixed_states(base, 3))
    adapters = [None if owner is None else sampler._adapters.acquire(f"a{owner}") for owner in owners]
    lora = DecodeLora(base.device, is_exact)
    lora.arrange(adapters)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for group in base._groups:
            x_TI = torch.randn(len(owners) + 3, group.matrix.in_features, generator=generator)
            y_TO = torch.randn(len(owners) + 3, group.matrix.out_features, generator=generator)
            expected_TO = y_TO.clone()
            for row, adapter in enumerate(adapters):
                if adapter is not None:
                    adapter.add(group.name, x_TI[row : row + 1], expected_TO[row : row + 1])
            lora.add(group.name, x_TI, y_TO)
            torch.testing.assert_close(y_TO, expected_TO, atol=1e-5, rtol=1e-5)


def test_answers_are_found_again_by_the_next_turn(base):
    """The second turn's prompt is the first with its answer; only what follows is computed."""
    states = mixed_states(base, 1)
    sampler = make_sampler(base, states, prefill_chunk_tokens=512)
    turn = prompt(1, 100)
    first = run_all(sampler, [sample("first", turn, "a0", seed=3, max_tokens=130)])["first"]
    ids = np.concatenate([turn, first.sequences[0].tokens, prompt(2, 40)])
    item = sample("second", ids, "a0", seed=4, max_tokens=20)
    second = run_all(sampler, [item])["second"]
    assert second.prompt_cache_hit_tokens == (100 + 130 - 1) // 64 * 64 == 192
    assert_like(second, run_all(make_sampler(base, states), [item])["second"])
    for other in (replace(item, adapter=None), replace(item, scope="somebody")):
        assert run_all(sampler, [other])["second"].prompt_cache_hit_tokens == 0


def test_in_deterministic_mode_answers_are_not_kept(base):
    sampler = make_sampler(base, prefill_chunk_tokens=64, deterministic=True)
    turn = prompt(1, 100)
    first = run_all(sampler, [sample("first", turn, seed=3, max_tokens=130)])["first"]
    ids = np.concatenate([turn, first.sequences[0].tokens, prompt(2, 40)])
    item = sample("second", ids, seed=4, max_tokens=20)
    second = run_all(sampler, [item])["second"]
    assert second.prompt_cache_hit_tokens == 64
    alone = make_sampler(base, prefill_chunk_tokens=64, deterministic=True, prefix_cache_mib=0)
    assert_same_sample(second, run_all(alone, [item])["second"])


def test_a_walk_that_gives_other_numbers_is_left_and_said_so(base, monkeypatch):
    assert lean_layers(base) is not None
    monkeypatch.setattr("tinsmith.sampling.layers.MAX_ERROR", dict.fromkeys((torch.float32, torch.bfloat16), -1.0))
    with structlog.testing.capture_logs() as logs:
        assert lean_layers(base) is None
    assert [(entry["log_level"], entry["because"]) for entry in logs] == [
        ("warning", "the faster walk gives other numbers")
    ]


@pytest.mark.parametrize(("chunk_tokens", "num_begun"), [(512, 64), (1024, 100)])
def test_as_many_short_prompts_begin_as_a_step_has_room_for(base, chunk_tokens: int, num_begun: int):
    """Of one snapshot; of more than fit in not all are looked at."""
    sampler = make_sampler(base, prefill_chunk_tokens=chunk_tokens)
    for i in range(100):
        sampler.submit(sample(f"r{i}", prompt(i, 4), max_tokens=3))
    sampler.step()
    assert sampler.seats == (num_begun, 256)
    assert sampler.kv_bytes[0] >= num_begun * sampler.memory.kv.shape.block_bytes
    assert sampler.kv_bytes[0] < sampler.kv_bytes[1] == 2**30
