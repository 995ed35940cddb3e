"""Pieces of samples that are still under way, as the worker sends them to the API: many in one datagram.

A datagram is one piece after the other: `<B` length of the request id, the id, `<III` sequence index, number of its
first token and length of the rest, then a SampledSequence message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace

from google.protobuf.message import DecodeError

from tinsmith.types import OpId, SampledSequence, SamplePiece
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.media import WireError
from tinsmith.wire.sampling import read_sequence, sequence_message

MAX_DATAGRAM_BYTES = 60_000
MAX_PIECE_TOKENS = 256
MAX_PIECE_BYTES = 32_000
HEAD = struct.Struct("<III")


def pack_pieces(pieces: Sequence[SamplePiece]) -> Iterator[tuple[list[SamplePiece], bytes]]:
    """Datagrams, and the pieces that each holds. A long piece is shortened to its first tokens."""
    packed: list[SamplePiece] = []
    data = b""
    for piece in pieces:
        short, body = _pack(piece)
        if packed and len(data) + len(body) > MAX_DATAGRAM_BYTES:
            yield packed, data
            packed, data = [], b""
        packed.append(short)
        data += body
    if packed:
        yield packed, data


def unpack_pieces(data: bytes) -> list[SamplePiece]:
    """Raises: WireError: it isn't a datagram of pieces."""
    pieces: list[SamplePiece] = []
    at = 0
    try:
        while at < len(data):
            end = at + 1 + data[at]
            op_id = OpId(data[at + 1 : end].decode("ascii"))
            index, start, size = HEAD.unpack_from(data, end)
            at = end + HEAD.size + size
            message = pb.SampledSequence.FromString(data[end + HEAD.size : at])
            pieces.append(SamplePiece(op_id, index, start, read_sequence(message)))
    except (struct.error, DecodeError, ValueError):
        raise WireError("not a datagram of sample pieces") from None
    return pieces


def _pack(piece: SamplePiece) -> tuple[SamplePiece, bytes]:
    k = 0 if piece.sequence.topk_tokens is None else piece.sequence.topk_tokens.shape[1]
    most = max(1, min(MAX_PIECE_TOKENS, MAX_PIECE_BYTES // (8 * (k + 1))))
    short = replace(piece, sequence=cut_sequence(piece.sequence, 0, most))
    op_id = piece.op_id.encode("ascii")
    body = bytes(sequence_message(short.sequence).SerializeToString())
    return short, bytes([len(op_id)]) + op_id + HEAD.pack(piece.index, piece.start, len(body)) + body


def cut_sequence(sequence: SampledSequence, start: int, end: int | None = None) -> SampledSequence:
    """Its tokens from `start` to before `end`, with what belongs to them."""
    part = slice(start, end)
    return replace(
        sequence,
        tokens=sequence.tokens[part],
        logprobs=sequence.logprobs[part],
        topk_tokens=None if sequence.topk_tokens is None else sequence.topk_tokens[part],
        topk_logprobs=None if sequence.topk_logprobs is None else sequence.topk_logprobs[part],
    )
