from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.files.virtual_file import READ_BYTES, Span, VirtualFile

STORED = bytes(range(256)) * 40
PIECE = st.one_of(
    st.binary(max_size=9),
    st.builds(Span, st.integers(0, 5000), st.integers(0, 5000)),
    st.builds(Span, st.just(0), st.just(0)),
)


@given(st.lists(PIECE, max_size=8), st.integers(0, 30_000), st.integers(0, 30_000))
def test_any_stretch_is_that_of_the_whole(pieces: list[bytes | Span], start: int, stop: int) -> None:
    whole = b"".join(p if isinstance(p, bytes) else STORED[p.offset : p.offset + p.size] for p in pieces)
    made = VirtualFile(pieces)
    assert made.size == len(whole)
    assert b"".join(made.read(io.BytesIO(STORED))) == whole
    assert b"".join(made.read(io.BytesIO(STORED), start, stop)) == whole[start:stop]


def test_neighbours_become_one() -> None:
    assert list(VirtualFile([Span(5, 3), b"", Span(8, 2), b"a", b"b", Span(0, 0), Span(20, 1)])) == [
        Span(5, 5), b"ab", Span(20, 1),
    ]  # fmt: skip


def test_a_large_file_comes_in_small_parts() -> None:
    stored = bytes(3 * READ_BYTES + 1)
    sizes = [len(part) for part in VirtualFile.whole(len(stored)).read(io.BytesIO(stored))]
    assert sizes == [READ_BYTES] * 3 + [1]


def test_a_stored_file_that_is_too_short_is_an_error() -> None:
    with pytest.raises(EOFError, match="2 bytes too early"):
        list(VirtualFile([Span(0, 5)]).read(io.BytesIO(b"abc")))
