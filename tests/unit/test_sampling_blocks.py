"""The ledger grants what leaves a way for everybody to finish, and nothing else."""

import random
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.sampling.blocks import BlockManager, Claim, is_safe, num_blocks

claims_of = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_num_blocks(tokens, blocks):
    assert num_blocks(tokens) == blocks


@given(st.integers(0, 8), claims_of)
def test_safe_means_that_some_order_lets_all_finish(free, pairs):
    claims = {i: Claim(held, held + more) for i, (held, more) in enumerate(pairs)}

    def finishes(order: tuple[int, ...]) -> bool:
        left = free
        for i in order:
            if claims[i].need - claims[i].held > left:
                return False
            left += claims[i].held
        return True

    assert is_safe(free, claims.values()) == any(finishes(order) for order in permutations(claims))


def test_refusal_changes_nothing():
    blocks = BlockManager(4)
    assert blocks.try_update({"a": Claim(2, 3)})
    assert not blocks.try_update({"b": Claim(2, 3)})
    assert blocks.num_held == 2
    assert blocks.try_update({"b": Claim(1, 4)})
    assert not blocks.try_update({"b": Claim(2, 4)})
    assert blocks.try_update({"a": Claim(3, 3)})
    blocks.release("a")
    assert blocks.try_update({"b": Claim(4, 4)})
    blocks.release("b")
    blocks.release("nobody")
    assert blocks.num_held == 0


def test_claims_change_together():
    blocks = BlockManager(3)
    assert blocks.try_update({"prompt": Claim(2, 3)})
    assert not blocks.try_update({"sequence": Claim(2, 3)})
    assert blocks.try_update({"prompt": None, "sequence": Claim(2, 3)})
    assert blocks.num_held == 2


@given(st.integers(0, 10**6))
def test_everybody_who_was_let_in_can_finish(seed):
    """Random growth, in random order, always ends with all finished."""
    rng = random.Random(seed)
    blocks = BlockManager(10)
    held: dict[int, int] = {}
    need: dict[int, int] = {}
    for i in range(8):
        need[i] = rng.randint(1, 10)
        if blocks.try_update({i: Claim(1, need[i])}):
            held[i] = 1
    for _ in range(1000):
        if not held:
            break
        moved = False
        for i in rng.sample(sorted(held), len(held)):
            if held[i] == need[i]:
                blocks.release(i)
                del held[i]
                moved = True
            elif blocks.try_update({i: Claim(held[i] + 1, need[i])}):
                held[i] += 1
                moved = True
        assert moved
        assert blocks.num_held <= blocks.total
    assert not held
