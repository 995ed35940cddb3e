"""Pages of keys and values give what contiguous memory gives; samples of a prompt share its blocks; none is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.numerics.lab import spec
from tests.numerics.sampling_lab import Letters, make_sampler, mixed_states, prompt, run_all, sample, state_of
from tinsmith.config import Settings
from tinsmith.model import load_base
from tinsmith.model.attention import AttentionKind
from tinsmith.sampling import Sampler
from tinsmith.sampling.kv import KVShape
from tinsmith.sampling.paged import PagedKV
from tinsmith.sampling.paged_attention import gathered_attention
from tinsmith.types import SampleResult

TOLERANCE = 1e-5


def paged_sampler(base: Any, states: Any = None, kv_blocks: int | None = None, **settings: Any) -> Sampler:
    sampler = Sampler(base, Settings(**settings), Letters(), kv_blocks=kv_blocks, is_paged=True)
    for key, state in (states or {}).items():
        sampler.add_adapter(key, state)
    return sampler


def assert_like(found: SampleResult, expected: SampleResult) -> None:
    for one, other in zip(found.sequences, expected.sequences, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kv_blocks", [None, 14])
def test_pages_give_what_contiguous_memory_gives(base, kv_blocks):
    """Ragged requests of several snapshots, groups, chunks and turns; in little memory some are preempted."""
    states = mixed_states(base, 4)
    items = [
        sample(
            f"r{i}", prompt(i % 9, (1, 20, 63, 64, 65, 150)[i % 6]), f"a{i % 4}", num_samples=1 + i % 3, seed=i,
            max_tokens=5 + 9 * (i % 8), prompt_logprobs=i % 4 == 0,
        )
        for i in range(18)
    ]  # fmt: skip
    expected = run_all(make_sampler(base, states, prefill_chunk_tokens=64), items)
    sampler = paged_sampler(base, states, kv_blocks, prefill_chunk_tokens=64)
    results: dict[str, Any] = {}
    for asked in items:
        sampler.submit(asked)
    while sampler.num_samples:
        results.update(sampler.step())
        assert sampler.memory.kv.num_allocated_blocks <= sampler.memory.num_held_blocks  # less what is found again
    for asked in items:
        assert_like(results[asked.op_id], expected[asked.op_id])
        if asked.prompt_logprobs:
            found, other = results[asked.op_id].prompt_logprobs, expected[asked.op_id].prompt_logprobs
            np.testing.assert_allclose(found[1:], other[1:], atol=TOLERANCE, rtol=0)
    assert sampler.memory.num_held_blocks == sampler.memory.kv.num_allocated_blocks == 0
    if kv_blocks is not None:
        assert sampler.preemptions.num_preempted > 0


def test_a_group_shares_the_whole_blocks_of_its_prompt(base):
    sampler = paged_sampler(base)
    sampler.submit(sample("g", prompt(1, 150), num_samples=8, seed=1, max_tokens=30))
    sampler.step()
    assert len(sampler._stages.running) == 8
    assert sampler.memory.kv.num_allocated_blocks == 2 + 8  # two whole blocks for all, a third for each
    assert sampler.memory.num_held_blocks == 2 + 8
    tables = list(sampler.memory.kv.tables.values())
    assert len({table[0] for table in tables}) == len({table[1] for table in tables}) == 1
    assert len({table[2] for table in tables}) == 8
    found = run_all(sampler)["g"]
    assert_like(
        found, run_all(make_sampler(base), [sample("g", prompt(1, 150), num_samples=8, seed=1, max_tokens=30)])["g"]
    )
    assert sampler.memory.kv.num_allocated_blocks == 0


@given(
    st.lists(st.tuples(st.sampled_from(["open", "place", "grow", "release", "close"]), st.integers(0, 3)), max_size=40)
)
def test_every_block_is_free_or_held_and_no_shared_one_is_written(actions: list[tuple[str, int]]) -> None:
    """Written is a sequence's last block alone, whatever happens to the others."""
    kv: PagedKV[int] = PagedKV(KVShape(((1, 2),), torch.float32, torch.device("cpu")), 40)
    prompts: dict[int, Any] = {}
    sizes: dict[int, int] = {}
    for number, (action, key) in enumerate(actions):
        if action == "open" and key not in prompts and kv.num_allocated_blocks < 30:
            prompts[key] = kv.open_prompt(key, 30 + 50 * key)
        elif action == "place" and key in prompts and kv.num_allocated_blocks < 30:
            sizes[number] = (30 + 50 * key + 1 + 63) // 64
            kv.place(number, key, sizes[number])
        elif action == "grow" and sizes and kv.num_allocated_blocks < 30:
            owner = sorted(sizes)[key % len(sizes)]
            kv.move(owner, sizes[owner], sizes[owner] + 1, 0)
            sizes[owner] += 1
        elif action == "release" and sizes:
            owner = sorted(sizes)[key % len(sizes)]
            kv.release(owner, sizes.pop(owner))
        elif action == "close" and key in prompts:
            del prompts[key]
            kv.close_prompt(key)
        tables = [*kv.tables.values(), *(prompt.table for prompt in prompts.values())]
        held = {block for table in tables for block in table}
        assert kv.num_allocated_blocks == len(held)
        for owner, table in kv.tables.items():
            assert len(table) == sizes[owner]
            assert sum(table[-1] in other for other in tables) == 1


def test_attention_over_pages_is_attention(base):
    """Against plain softmax in double precision, one sequence at a time."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 9, 64, 2, 16, generator=generator)
    q = torch.randn(3, 6, 16, generator=generator)
    tables, lengths = torch.tensor([[3, 1], [5, 8], [0, 8]]), torch.tensor([100, 64, 1])
    found = gathered_attention(q, k, v, tables, lengths, AttentionKind(0.25))
    for row in range(3):
        keys, values = (pool[tables[row]].flatten(0, 1)[: lengths[row]].double() for pool in (k, v))
        for head in range(6):
            scores = keys[:, head // 3] @ q[row, head].double() * 0.25
            expected = torch.softmax(scores, 0) @ values[:, head // 3]
            torch.testing.assert_close(found[row, head].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_bfloat16_base_gives_float32_logprobs_near_those_of_transformers(base, is_paged):
    half = load_base(base.info, device=torch.device("cpu"), dtype=torch.bfloat16)
    sampler = Sampler(half, Settings(), Letters(), is_paged=is_paged)
    sampler.add_adapter("a", state_of(half, spec("run", 8)))
    items = [sample(f"r{i}", prompt(i, 20 + 30 * i), (None, "a")[i % 2], seed=i, max_tokens=40) for i in range(4)]
    results = run_all(sampler, items)
    model = AutoModelForCausalLM.from_pretrained(base.info.path, dtype=torch.bfloat16)
    for asked in items:
        (sequence,) = results[asked.op_id].sequences
        assert sequence.logprobs.dtype == np.float32
        assert np.isfinite(sequence.logprobs).all()
        if asked.adapter is None:
            tokens = torch.from_numpy(np.concatenate([asked.prompt, sequence.tokens]).astype(np.int64))
            with torch.no_grad():
                rows = model(input_ids=tokens[None]).logits[0, len(asked.prompt) - 1 : -1].float().log_softmax(-1)
            expected = rows.gather(1, tokens[len(asked.prompt) :, None])[:, 0].numpy()
            assert np.abs(expected - sequence.logprobs).mean() < 2e-2
