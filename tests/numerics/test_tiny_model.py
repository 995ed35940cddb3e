"""The shipped model keeps its bands: it adds well enough to be recognised and badly enough to have something to learn.

Exact probabilities of the right answer, as temperature 1 draws it, so that nothing here depends on chance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.tiny_model.measure import DOUBLE_BAND, SINGLE_BAND, Sum, expected_rate, random_sums
from tinsmith.bases.catalog import SHIPPED_PATH

MAX_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED_PATH, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(SHIPPED_PATH)


def test_single_digit_sums_are_right_a_third_to_two_thirds_of_the_time(tiny: tuple[Any, Any]) -> None:
    assert SINGLE_BAND == (1 / 3, 2 / 3)
    sums = [Sum(left, right) for left in range(10) for right in range(10)]
    assert SINGLE_BAND[0] <= expected_rate(*tiny, sums) <= SINGLE_BAND[1]


def test_sums_up_to_a_hundred_are_right_in_10_to_40_per_cent(tiny: tuple[Any, Any]) -> None:
    assert DOUBLE_BAND == (0.10, 0.40)
    assert DOUBLE_BAND[0] <= expected_rate(*tiny, random_sums(0, 800, 100)) <= DOUBLE_BAND[1]


def test_it_is_small_and_its_embeddings_are_not_tied(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    assert model.config.model_type == "qwen3"
    assert not model.config.tie_word_embeddings
    assert sum(path.stat().st_size for path in SHIPPED_PATH.iterdir()) <= MAX_BYTES
