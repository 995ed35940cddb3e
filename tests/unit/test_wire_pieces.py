"""Pieces of samples in datagrams, and the line that carries them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tinsmith.errors import ConfigError
from tinsmith.ipc.tokenline import TokenLine, TokenSender, line_path
from tinsmith.types import OpId, SampledSequence, SamplePiece
from tinsmith.wire.media import WireError
from tinsmith.wire.pieces import MAX_DATAGRAM_BYTES, pack_pieces, unpack_pieces


def piece(number: int, num_tokens: int, start: int = 0, k: int = 0) -> SamplePiece:
    tokens = np.arange(num_tokens, dtype=np.int32)
    sequence = SampledSequence(tokens, tokens.astype(np.float32) / 3, stopped=False)
    if k:
        tops = np.arange(num_tokens * k, dtype=np.int32).reshape(-1, k)
        sequence = SampledSequence(tokens, sequence.logprobs, False, tops, tops.astype(np.float32))
    return SamplePiece(OpId(f"req-{number:032x}"), number, start, sequence)


def assert_equal(found: SamplePiece, expected: SamplePiece) -> None:
    assert (found.op_id, found.index, found.start) == (expected.op_id, expected.index, expected.start)
    for name in ("tokens", "logprobs", "topk_tokens", "topk_logprobs"):
        np.testing.assert_array_equal(getattr(found.sequence, name), getattr(expected.sequence, name))


def test_pieces_come_back_as_they_were() -> None:
    pieces = [piece(1, 3, start=7), piece(2, 1, k=4), piece(3, 0)]
    ((packed, datagram),) = pack_pieces(pieces)
    for found, sent, expected in zip(unpack_pieces(datagram), packed, pieces, strict=True):
        assert_equal(found, expected)
        assert_equal(sent, expected)


def test_datagrams_are_bounded_and_long_pieces_shortened() -> None:
    pieces = [piece(number, 900, k=number % 21) for number in range(40)] + [piece(99, 5000, k=128)]
    datagrams = list(pack_pieces(pieces))
    assert all(len(datagram) <= MAX_DATAGRAM_BYTES for _, datagram in datagrams)
    found = [each for _, datagram in datagrams for each in unpack_pieces(datagram)]
    assert [each.op_id for each in found] == [each.op_id for each in pieces]
    assert all(0 < len(each.sequence.tokens) < 900 for each in found)


@pytest.mark.parametrize("cut", [1, 10, 40, -1])
def test_half_a_datagram_is_refused(cut: int) -> None:
    ((_, datagram),) = pack_pieces([piece(1, 3)])
    with pytest.raises(WireError):
        unpack_pieces(datagram[:cut])


def test_the_line_carries_until_it_is_full_and_never_waits(tmp_path: Path) -> None:
    path = line_path(tmp_path / "api.sock")
    with closing(TokenSender(path)) as sender:
        assert not sender.send(b"nobody listens")
        with closing(TokenLine(path)) as line:
            assert list(line.heard()) == []
            sent = []
            while len(sent) < 100_000 and sender.send(datagram := f"{len(sent)}".encode()):
                sent.append(datagram)
            assert list(line.heard()) == sent
            assert sender.send(b"again")
            assert list(line.heard()) == [b"again"]
        assert not path.exists()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    for make in (TokenLine, TokenSender):
        with pytest.raises(ConfigError, match="data-dir"):
            make(tmp_path / ("x" * 120))
