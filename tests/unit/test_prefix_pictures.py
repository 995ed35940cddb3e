"""Computed beginnings are found again only under the same pictures at the same places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.paint import IMAGE_TOKEN, png
from tinsmith.pictures import Picture
from tinsmith.sampling.prefix import Line, PrefixCache

GRID = 8
ALICE: Line = ("alice", None)
TOKENS = np.array([1, 2, *[IMAGE_TOKEN] * 8, *range(3, 25)], np.int32)


@dataclass
class Nothing:
    num_bytes: int = 1

    def drop(self) -> None:
        pass


def see(seed: int = 0, start: int = 2, num_tokens: int = 8) -> Picture:
    return Picture(start, num_tokens, png(32, 64, seed), 32, 64)


def known(cache: PrefixCache, *pictures: Picture, line: Line = ALICE) -> int:
    return cache.fill(line, TOKENS, lambda at, kept: None, len(TOKENS), pictures)


def filled(*pictures: Picture) -> PrefixCache:
    cache = PrefixCache(GRID, 1 << 20)
    cache.keep(ALICE, TOKENS, lambda start, end: Nothing(), 0, len(TOKENS), pictures)  # type: ignore[arg-type, return-value]
    return cache


def test_the_same_picture_is_found_and_one_changed_pixel_is_not() -> None:
    cache = filled(see())
    assert known(cache, see()) == 32
    assert known(cache, see(1)) == 0
    assert known(cache) == 0


def test_what_comes_before_the_changed_picture_is_found() -> None:
    cache = filled(see(start=10))
    assert known(cache, see(1, start=10)) == 8


def test_one_picture_of_eight_tokens_is_not_two_of_four() -> None:
    cache = filled(see(0, 2, 4), see(1, 6, 4))
    assert known(cache, see(0, 2, 4), see(1, 6, 4)) == 32
    assert known(cache, see(1, 2, 4), see(0, 6, 4)) == 0
    assert known(cache, see(0, 2, 8)) == 0


def test_another_tenant_s_picture_is_another_beginning() -> None:
    assert known(filled(see()), see(), line=("bob", None)) == 0
