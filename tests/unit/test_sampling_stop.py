"""Stop tokens, and stop strings in the text of the tokens."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.sampling.stop import StopRule
from tinsmith.types import SamplingParams

PIECES = ("a", "b", "ab", "ba", "", "aab", "\n", "x" * 30)


class Pieces:
    """Counts what it decodes."""

    def __init__(self) -> None:
        self.num_decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        return "".join(PIECES[i] for i in ids)


def rule(*strings: str, tokens: tuple[int, ...] | None = ()) -> StopRule:
    return StopRule.of(SamplingParams(stop_tokens=tokens, stop_strings=strings), (7,), Pieces())


def end_of(stop: StopRule, tokens: Sequence[int]) -> int | None:
    """The number of tokens at which it ends."""
    return next((n for n in range(1, len(tokens) + 1) if stop.ends(tokens[:n])), None)


@pytest.mark.parametrize(
    ("stop", "tokens", "expected"),
    [
        (rule(tokens=None), [0, 7, 1], 2),
        (rule(), [0, 7, 1], None),
        (rule(tokens=(1,)), [7, 0, 1], 3),
        (rule("ab"), [1, 0, 1, 0], 3),
        (rule("ab"), [0, 2], 2),
        (rule("ba"), [0, 5], None),
        (rule("baab"), [1, 5], 2),
        (rule("ab"), [0, 4, 4, 4, 1], 5),
        (rule("zz", "\n"), [0, 6, 0], 2),
        (rule("ab", tokens=None), [7], 1),
    ],
)
def test_where_it_ends(stop, tokens, expected):
    assert end_of(stop, tokens) == expected


@given(st.lists(st.integers(0, 7), min_size=1, max_size=120), st.text("ab", min_size=1, max_size=5))
def test_it_ends_at_the_token_that_completes_the_string(tokens, string):
    text = Pieces().decode
    expected = next((n for n in range(1, len(tokens) + 1) if string in text(tokens[:n])), None)
    assert end_of(rule(string), tokens) == expected


def test_the_work_per_token_does_not_grow_with_the_length():
    pieces = Pieces()
    stop = StopRule(frozenset(), ("never",), pieces)
    stop.ends([0] * 10_000)
    assert pieces.num_decoded < 50
