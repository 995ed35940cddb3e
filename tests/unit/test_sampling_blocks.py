"""The ledger grants what is free, all of a change or nothing of it."""

from __future__ import annotations

import pytest

from tinsmith.sampling.blocks import FreeBlocks, num_blocks


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_num_blocks(tokens: int, blocks: int) -> None:
    assert num_blocks(tokens) == blocks


def test_refusal_changes_nothing() -> None:
    blocks = FreeBlocks(4)
    assert blocks.try_update({"a": 2})
    assert not blocks.try_update({"b": 3})
    assert blocks.num_held == 2
    assert blocks.try_update({"b": 1})
    assert not blocks.try_update({"b": 3})
    assert blocks.try_update({"a": 3})
    blocks.release("a")
    assert blocks.try_update({"b": 4})
    blocks.release("b")
    blocks.release("nobody")
    assert blocks.num_held == 0


def test_things_change_together() -> None:
    blocks = FreeBlocks(3)
    assert blocks.try_update({"prompt": 2})
    assert not blocks.try_update({"sequence": 2})
    assert blocks.try_update({"prompt": None, "sequence": 2})
    assert blocks.num_held == 2
