"""Tokens to text in pieces: put together, the pieces are the text of the whole."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.api.texts.written import ContradictionError, Search, Written
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.types import SampledSequence

TOKENIZER = ChatTokenizer.from_dir(SHIPPED_PATH)
END = 1000
TOKENS = st.lists(st.integers(0, 997) | st.sampled_from([1001, 1013, 1014]), max_size=60)


def sequence(tokens: list[int], *, stopped: bool) -> SampledSequence:
    return SampledSequence(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), stopped)


def whole(tokens: list[int], stops: tuple[str, ...] = (), *, stopped: bool = False) -> str:
    return Written(TOKENIZER, [END], stops).end(sequence(tokens, stopped=stopped)).text


def in_pieces(tokens: list[int], cuts: list[int], stops: tuple[str, ...] = (), *, stopped: bool = False) -> str:
    written = Written(TOKENIZER, [END], stops)
    edges = sorted({min(cut, len(tokens)) for cut in cuts})
    texts = [written.add(tokens[start:end]) for start, end in zip([0, *edges], edges, strict=False)]
    return "".join([*texts, written.end(sequence(tokens, stopped=stopped)).text])


@settings(deadline=None, max_examples=300)
@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 60), max_size=20))
def test_pieces_make_the_whole(tokens: list[int], cuts: list[int]) -> None:
    assert in_pieces(tokens, cuts) == whole(tokens) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40))
def test_what_is_sent_token_by_token_never_ends_in_half_a_character(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    written, sent = Written(TOKENIZER, [END], ()), ""
    for token in tokens:
        sent += written.add([token])
        assert TOKENIZER.decode(tokens, skip_special_tokens=True).startswith(sent)
    assert sent + written.end(sequence(tokens, stopped=False)).text == TOKENIZER.decode(
        tokens, skip_special_tokens=True
    )


@settings(deadline=None, max_examples=200)
@given(words=st.lists(st.sampled_from(["a", "ab", "abc", "bca", " ", "é", "stop"]), max_size=20), cut=st.integers(1, 9))
def test_no_part_of_a_stop_string_goes_out(words: list[str], cut: int) -> None:
    stops = ("abca", "sto", "é a")
    tokens = TOKENIZER.encode("".join(words))
    ended = [n for n in range(1, len(tokens) + 1) if any(s in TOKENIZER.decode(tokens[:n]) for s in stops)]
    tokens = tokens[: ended[0]] if ended else tokens
    expected = TOKENIZER.decode(tokens)
    for stop in stops if ended else ():
        expected = expected[: expected.find(stop)] if stop in expected else expected
    pieces = in_pieces(tokens, list(range(0, 60, cut)), stops, stopped=bool(ended))
    assert pieces == whole(tokens, stops, stopped=bool(ended)) == expected


@settings(deadline=None)
@given(string=st.text("ab", min_size=1, max_size=8), pieces=st.lists(st.text("ab", max_size=6), max_size=20))
def test_a_search_in_pieces_finds_what_a_search_of_the_whole_does(string: str, pieces: list[str]) -> None:
    search, text = Search(string), ""
    for piece in pieces:
        search.read(piece)
        text += piece
        at = text.find(string)
        assert search.found_at == (None if at < 0 else at)
        begun = max(n for n in range(min(len(string) - 1, len(text)) + 1) if text.endswith(string[:n]))
        assert search.num_begun == (begun if at < 0 else 0)


def test_a_search_takes_time_by_the_new_text_alone() -> None:
    def cost_s(length: int) -> float:
        searches = [Search("a" * length + chr(0x4E00 + i)) for i in range(64)]
        for search in searches:
            search.read("a" * 2 * length)
        started = time.perf_counter()
        for _ in range(50):
            for search in searches:
                search.read("aaaa")
        return time.perf_counter() - started

    cost_s(10)
    assert cost_s(20_000) < 10 * cost_s(200) + 0.05


def test_the_end_token_is_no_text_and_no_stop_string() -> None:
    tokens = [*TOKENIZER.encode("Paris"), END]
    ending = Written(TOKENIZER, [END], ("x",)).end(sequence(tokens, stopped=True))
    assert (ending.text, ending.is_whole, ending.stop_string) == ("Paris", True, None)
    keeping = Written(TOKENIZER, [END], (), keeps_special=True).end(sequence([1001, *tokens], stopped=True))
    assert keeping.text == "<|object_ref_start|>Paris"


def test_the_stop_string_that_ended_it_is_named() -> None:
    tokens = TOKENIZER.encode("one, two")
    ending = Written(TOKENIZER, [END], ("two", "tw")).end(sequence(tokens, stopped=True))
    assert (ending.text, ending.stop_string) == ("one, ", "tw")


def test_a_result_that_contradicts_what_was_sent_is_an_error() -> None:
    written = Written(TOKENIZER, [END], ())
    written.add([5, 6, 7])
    with pytest.raises(ContradictionError):
        written.end(sequence([5, 6, 8], stopped=False))


def test_the_bytes_of_a_token() -> None:
    for text in ("é", "火", "🙂"):
        tokens = TOKENIZER.encode(text)
        assert b"".join(TOKENIZER.token_bytes(token) or b"" for token in tokens) == text.encode()
    assert TOKENIZER.token_bytes(END) == b"<|im_end|>"
    assert TOKENIZER.longest_token >= len("<|object_ref_start|>")
