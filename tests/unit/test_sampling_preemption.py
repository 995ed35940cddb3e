"""Who gives memory back is decided by who holds most and who came last, and never hits the oldest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_sampling_seats import request
from tinsmith.sampling.blocks import FreeBlocks
from tinsmith.sampling.preemption import choose_victim, spare_blocks
from tinsmith.sampling.sequence import Request, Sequence


def arrived(tenant: str, arrival: int) -> Request:
    made = request(tenant)
    made.arrival = arrival
    return made


def test_the_youngest_of_who_holds_most() -> None:
    a, b = arrived("a", 1), arrived("b", 2)
    holders = [Sequence(a, 0), Sequence(a, 1), Sequence(b, 0), Sequence(b, 1)]
    assert choose_victim(holders, {"a": 5, "b": 4}.__getitem__) is holders[1]
    assert choose_victim(holders, {"a": 4, "b": 5}.__getitem__) is holders[3]
    assert choose_victim(holders, {"a": 4, "b": 5}.__getitem__, tenant="a") is holders[1]
    assert choose_victim([*holders, a], {"a": 5, "b": 4}.__getitem__) is a  # its prompt, before those that it started


def test_never_the_oldest() -> None:
    a, b = arrived("a", 1), arrived("b", 2)
    first, other = Sequence(a, 0), Sequence(b, 0)
    assert choose_victim([other, first], {"a": 9, "b": 1}.__getitem__) is other
    assert choose_victim([first], {"a": 9}.__getitem__) is None
    assert choose_victim([first, other], {"a": 9, "b": 1}.__getitem__, tenant="a") is None


def test_what_is_left_free_for_those_that_grow() -> None:
    assert [spare_blocks(64, running) for running in (0, 1, 4, 5, 100)] == [0, 1, 1, 2, 8]
    assert spare_blocks(64, 4, num_preempted=3) == 4


def test_what_is_free_is_granted() -> None:
    blocks = FreeBlocks(8, owner_total=6)
    assert blocks.try_update({1: 3}, "a")
    assert not blocks.try_update({2: 2}, "b", spare=4)
    assert blocks.try_update({2: 2}, "b", spare=3)
    assert not blocks.try_update({1: 7}, "a")
    assert not blocks.is_at_bound("a")
    assert blocks.try_update({1: 6}, "a")
    assert blocks.is_at_bound("a")
    assert blocks.num_held == 8
    assert not blocks.try_update({2: 3}, "b")
    blocks.release(1, "a")
    blocks.release(1, "a")
    assert (blocks.num_held, blocks.held_by("a"), blocks.held_by("b")) == (2, 0, 2)


def test_alone_nothing_need_stay_free() -> None:
    blocks = FreeBlocks(4)
    assert blocks.try_update({1: 4}, "a", spare=2)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=30))
def test_the_ledger_is_the_sum_of_what_is_held(changes: list[tuple[int, int]]) -> None:
    blocks, held = FreeBlocks(9), {}
    for key, size in changes:
        owner = "ab"[key % 2]
        if blocks.try_update({key: size or None}, owner):
            held[key] = size
        assert blocks.num_held == sum(held.values()) <= 9
        for name, parity in (("a", 0), ("b", 1)):
            assert blocks.held_by(name) == sum(size for key, size in held.items() if key % 2 == parity)


@pytest.mark.parametrize("total", [1, 3, 7])
def test_small_memories_leave_nothing_free(total: int) -> None:
    assert spare_blocks(total, 100) == 0
