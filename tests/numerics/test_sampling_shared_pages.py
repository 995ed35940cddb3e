"""Beginnings that are found again are the very blocks that were written, and nothing of the answers shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.sampling_lab import Letters, assert_same_sample, mixed_states, prompt, run_all, sample
from tinsmith.config import Settings
from tinsmith.model import BaseModel
from tinsmith.sampling import Sampler
from tinsmith.sampling.kv import Copies, KVShape
from tinsmith.sampling.paged import PagedKV, Pages, Pool
from tinsmith.types import SampleResult


def paged_sampler(base: BaseModel, kv_blocks: int | None = None, **settings: Any) -> Sampler:
    sampler = Sampler(base, Settings(prefill_chunk_tokens=64, **settings), Letters(), kv_blocks, is_paged=True)
    for key, state in mixed_states(base, 2).items():
        sampler.add_adapter(key, state)
    return sampler


def pool_of(sampler: Sampler) -> Pool:
    kv = sampler.memory.kv
    assert isinstance(kv, PagedKV)
    return kv.pool


def talk(sampler: Sampler) -> list[SampleResult]:
    """Two turns, the second by a group, and then both beginnings at once beside a stranger."""
    stem = prompt(1, 150)
    first = run_all(sampler, [sample("first", stem, "a0", seed=1, max_tokens=60)])["first"]
    longer = np.concatenate([stem, first.sequences[0].tokens, prompt(2, 30)])
    second = run_all(sampler, [sample("second", longer, "a0", num_samples=4, seed=2, max_tokens=70)])["second"]
    last = [
        sample("again", stem, "a0", seed=3, max_tokens=20),
        sample("longer", longer, "a0", seed=4, max_tokens=20),
        sample("other", stem, "a1", seed=5, max_tokens=20),
    ]
    found = run_all(sampler, last)
    return [first, second, *(found[asked.op_id] for asked in last)]


def test_shared_blocks_give_the_bits_of_copies(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = talk(paged_sampler(base))
    assert [result.prompt_cache_hit_tokens for result in shared] == [0, 192, 128, 192, 0]
    with monkeypatch.context() as patched:
        patched.setattr(Pool, "keep", lambda self, table, start, end, states=None: Copies(self.read(table, start, end)))
        copied = talk(paged_sampler(base))
    for one, other in zip(shared, copied, strict=True):
        assert one.prompt_cache_hit_tokens == other.prompt_cache_hit_tokens
        assert_same_sample(one, other)


def test_a_groups_shared_blocks_give_the_bits_of_copies(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    item = sample("g", prompt(1, 150), "a0", num_samples=5, seed=1, max_tokens=90)
    shared = run_all(paged_sampler(base), [item])["g"]
    with monkeypatch.context() as patched:
        patched.setattr(PagedKV, "place", _place_copies)
        patched.setattr(PagedKV, "num_shared", lambda self, num_tokens: 0)
        copied = run_all(paged_sampler(base), [item])["g"]
    assert_same_sample(shared, copied)


def _place_copies(self: PagedKV[Any], owner: Any, prompt_owner: Any, size: int) -> None:
    table = self._prompts[prompt_owner].table
    own = self.pool.take(size)
    for source, target in zip(table, own, strict=False):
        self.pool.copy(source, target)
    self.tables[owner] = own
    self.version += 1


def test_a_hit_has_the_blocks_themselves_in_its_table(base: BaseModel) -> None:
    sampler = paged_sampler(base)
    run_all(sampler, [sample("first", prompt(1, 150), "a0", max_tokens=1)])
    kept = {block for piece in sampler._prefixes._pieces.values() if isinstance(piece, Pages) for block in piece.blocks}
    assert len(kept) == 2
    assert sampler.memory.kv.num_allocated_blocks == sampler.memory.num_held_blocks == 0
    for name in ("b", "c"):
        sampler.submit(sample(name, prompt(1, 150), "a0", max_tokens=9))
    sampler.step()
    sampler.step()
    kv = sampler.memory.kv
    assert isinstance(kv, PagedKV)
    assert len(kv.tables) == 2
    assert all(set(table[:2]) == kept for table in kv.tables.values())
    assert kv.num_allocated_blocks == 2 + 2
    run_all(sampler)


def test_what_is_kept_stays_within_its_bytes_and_comes_back(base: BaseModel) -> None:
    sampler = paged_sampler(base, kv_blocks=12, prefix_cache_mib=1)
    pool = pool_of(sampler)
    num_all, room = pool.num_free, 2**20 // pool.block_bytes
    assert num_all == 12 + room + 1
    for i in range(room // 2 + 6):
        run_all(sampler, [sample(f"r{i}", prompt(i, 200), "a0", seed=i, max_tokens=3)])
        kept = {block for piece in sampler._prefixes._pieces.values() for block in getattr(piece, "blocks", ())}
        assert len(kept) <= room
        assert sampler._prefixes.num_bytes == len(kept) * pool.block_bytes
        assert pool.num_free == num_all - len(kept)
    assert len(kept) > room - 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "place", "grow", "release", "close", "keep", "forget", "load"]), st.integers(0, 3)
        ),
        max_size=60,
    )
)
def test_no_block_that_is_kept_or_shared_is_written_and_none_is_lost(actions: list[tuple[str, int]]) -> None:
    kv: PagedKV[int] = PagedKV(KVShape(((1, 2),), torch.float32, torch.device("cpu")), 40, 20 * 1024)
    num_all = kv.pool.num_free
    prompts: dict[int, Any] = {}
    pieces: list[Any] = []
    for number, (action, key) in enumerate(actions):
        size = 30 + 50 * key
        has_room = kv.num_allocated_blocks < 30
        if action == "open" and key not in prompts and has_room:
            prompts[key] = kv.open_prompt(key, size)
        elif action == "load" and key in prompts and pieces and size > 64:
            prompts[key].load(0, pieces[-1])
        elif action == "place" and key in prompts and has_room:
            kv.place(number, key, (size + 1 + 63) // 64)
        elif action == "grow" and kv.tables and has_room:
            owner = sorted(kv.tables)[key % len(kv.tables)]
            kv.move(owner, len(kv.tables[owner]), len(kv.tables[owner]) + 1, 0)
        elif action == "release" and kv.tables:
            owner = sorted(kv.tables)[key % len(kv.tables)]
            kv.release(owner, len(kv.tables[owner]))
        elif action == "close" and key in prompts:
            kv.close_prompt(key)
            del prompts[key]
        elif action == "keep" and len(pieces) < 20:
            long = [owner for owner, table in kv.tables.items() if len(table) > 1]
            pieces += [kv.save(owner, 0, 0, 64) for owner in long[:1]]
        elif action == "forget" and pieces:
            pieces.pop(key % len(pieces)).drop()
        tables = [*kv.tables.values(), *(prompt.table for prompt in prompts.values())]
        held = {block for table in tables for block in table}
        kept = {block for piece in pieces for block in piece.blocks}
        assert kv.num_allocated_blocks == len(held)
        assert kv.pool.num_free == num_all - len(held | kept)
        for table in kv.tables.values():
            assert sum(table[-1] in other for other in tables) == 1
            assert table[-1] not in kept
