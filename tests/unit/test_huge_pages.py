"""Blocks side by side in huge pages: where they lie, what is taken back, and who may let go of them."""

from __future__ import annotations

import gc
import mmap
import random
import threading

import numpy as np
import pytest
import torch

from tests.service import until
from tinsmith.machine import huge_pages
from tinsmith.machine.huge_pages import CHUNK_BYTES, HUGE_BYTES, PREPARED_BYTES, HugePages

PAGE = mmap.PAGESIZE


def at(block: np.ndarray) -> int:
    return int(block.ctypes.data)


def test_blocks_lie_side_by_side_from_the_beginning_of_a_huge_page():
    pages = HugePages(warm_bytes=0)
    blocks = [pages.empty(size) for size in (PAGE // 4 + 1, 3, PAGE)]
    assert at(blocks[0]) % HUGE_BYTES == 0
    assert [at(block) - at(blocks[0]) for block in blocks] == [0, 2 * PAGE, 3 * PAGE]
    assert [len(block) for block in blocks] == [PAGE // 4 + 1, 3, PAGE]
    assert pages.num_bytes == 7 * PAGE
    for number, block in enumerate(blocks):
        block.fill(number)
    assert [set(block.tolist()) for block in blocks] == [{0.0}, {1.0}, {2.0}]


def test_what_nobody_has_any_more_is_taken_again_and_reads_as_zeros():
    pages = HugePages(warm_bytes=0)
    first, second, third = (pages.empty(PAGE) for _ in range(3))
    for block in (first, second, third):
        block.fill(7.0)
    view = torch.from_numpy(second)[5:]
    place = at(second)
    del second
    assert pages.num_bytes == 12 * PAGE  # the view has it yet
    del view
    assert pages.num_bytes == 8 * PAGE
    again = pages.empty(PAGE // 2)
    assert at(again) == place
    assert not again.any()
    assert first.all()
    assert third.all()


def test_memory_is_kept_for_a_block_of_the_same_size(monkeypatch):
    monkeypatch.setattr(huge_pages, "MAX_WARM", 2)
    pages = HugePages(warm_bytes=12 * PAGE)
    held = pages.empty(PAGE)
    places = []
    for size in (PAGE, 2 * PAGE, PAGE):
        block = pages.empty(size)
        block.fill(size)
        places.append(at(block))
        del block
    assert places[0] == places[2]
    assert pages.num_bytes == (4 + 4 + 8) * PAGE
    again = pages.empty(2 * PAGE)
    assert at(again) == places[1]
    assert again.all(), "its memory was not given back"
    del again
    pages.empty(3 * PAGE)
    assert pages.num_bytes == (4 + 12) * PAGE, "the oldest are given back"
    few = [pages.empty(1) for _ in range(3)]
    del few
    assert pages.num_bytes == (4 + 2) * PAGE, "not too many are kept"
    del held
    assert len(pages._chunks) == 1


def test_beside_a_large_block_another_is_prepared():
    pages = HugePages()
    held = [pages.empty(PREPARED_BYTES // 4)]
    for number in range(1, 4):
        until(lambda: len(pages._warm) == 1, 10)
        held.append(pages.empty(PREPARED_BYTES // 4))
        assert at(held[-1]) == at(held[-2]) + PREPARED_BYTES
        held[-1].fill(number)
    assert [block[-1] for block in held] == [0.0, 1.0, 2.0, 3.0]
    until(lambda: len(pages._warm) == 1, 10)
    del held[1:]
    pages.empty(PREPARED_BYTES // 4)
    pages._preparing.shutdown()
    assert pages.num_bytes == 5 * PREPARED_BYTES, "there were some already"


def test_holes_side_by_side_are_one():
    pages = HugePages(warm_bytes=0)
    blocks = [pages.empty(PAGE) for _ in range(5)]
    place = at(blocks[1])
    del blocks[1:4]
    assert at(pages.empty(3 * PAGE)) == place


def test_a_chunk_without_blocks_goes_and_one_larger_than_a_chunk_has_its_own():
    pages = HugePages(warm_bytes=0)
    large = pages.empty(CHUNK_BYTES // 4 + 1)
    small = pages.empty(1)
    assert len(pages._chunks) == 2
    assert at(large) % HUGE_BYTES == 0
    del large
    assert len(pages._chunks) == 1
    del small
    assert pages.num_bytes == 0
    assert not pages._chunks


def test_blocks_never_overlap_whatever_comes_and_goes(monkeypatch):
    monkeypatch.setattr(huge_pages, "CHUNK_BYTES", 32 * PAGE)
    draw = random.Random(0)
    pages = HugePages(warm_bytes=0)
    held: list[tuple[float, np.ndarray]] = []
    for number in range(600):
        if held and draw.random() < 0.5:
            held.pop(draw.randrange(len(held)))
        block = pages.empty(draw.randrange(1, 3 * PAGE))
        block.fill(number)
        held.append((number, block))
        del block
        if number % 50 == 0:
            assert all((block == value).all() for value, block in held)
            assert pages.num_bytes == sum(-(-4 * len(block) // PAGE) * PAGE for _, block in held)
    held.clear()
    assert not pages._chunks


def test_threads_take_and_let_go_at_once():
    pages = HugePages(warm_bytes=0)

    def work(number: int) -> None:
        for _ in range(200):
            block = pages.empty(PAGE)
            block.fill(number)
            wrong.extend(block[block != number])

    wrong: list[float] = []
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    gc.collect()
    assert not wrong
    assert pages.num_bytes == 0


def test_a_block_that_is_let_go_of_in_the_middle_is_swept_later():
    pages = HugePages(warm_bytes=0)
    block = pages.empty(1)
    with pages._lock:
        del block
        assert pages._left
    assert pages.num_bytes == 0


def test_without_huge_pages_or_memory(monkeypatch):
    monkeypatch.setattr(huge_pages, "ADVICE", -1)  # as a kernel that doesn't know it
    pages = HugePages(warm_bytes=0)
    block = pages.empty(3)
    block.fill(1.0)
    with pytest.raises(MemoryError, match="no memory for"):
        pages.empty(2**58)
    assert block.all()
    assert pages.num_bytes == PAGE
