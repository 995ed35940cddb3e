"""A worker tells of samples under way, to those who asked for it, and the recorded result agrees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.flow.house import House, settle
from tinsmith.api.pieces import Heard
from tinsmith.ipc.tokenline import TokenLine, TokenSender
from tinsmith.store.rows import NewOp, OpRow
from tinsmith.types import OpId, OpKind, SamplePiece
from tinsmith.wire.media import encode_json
from tinsmith.wire.meta import SampleMeta, to_meta
from tinsmith.wire.pieces import unpack_pieces
from tinsmith.wire.sampling import decode_sample_result


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def ask(house: House, *, stream: bool, max_tokens: int = 60, topk: int = 0) -> OpRow:
    sampler = house.sampler()
    body = {
        "prompt": {"chunks": [{"tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": max_tokens},
        "num_samples": 2,
        "topk_sample_logprobs": topk,
    }
    return house.enqueue(
        NewOp(
            tenant_id=house.tenant,
            kind=OpKind.SAMPLE,
            base_model="fake/base",
            id=OpId(f"req-{stream}-{topk}"),
            seq_id=topk + 10 * stream,
            sampler_id=sampler,
            payload=encode_json(body),
            meta=to_meta(SampleMeta(5, sampler, 2, stream)),
        )
    )


def heard(line: TokenLine) -> list[SamplePiece]:
    return [piece for datagram in line.heard() for piece in unpack_pieces(datagram)]


@pytest.mark.parametrize("topk", [0, 3])
def test_pieces_are_the_beginning_of_the_result(house: House, tmp_path: Path, topk: int) -> None:
    with closing(TokenLine(tmp_path / "l")) as line, closing(TokenSender(tmp_path / "l")) as sender:
        streamed, silent = ask(house, stream=True, topk=topk), ask(house, stream=False, topk=topk)
        settle(house.worker(line=sender))
        result = decode_sample_result(house.result(streamed))
        assert house.get(silent).state == "done"
        pieces = heard(line)
    assert {piece.op_id for piece in pieces} == {streamed.id}
    ear = Heard()
    for piece in pieces:
        ear.add(piece)
    known = {0: 0, 1: 0}
    for piece in ear.take():
        assert piece.start == known[piece.index]
        end = known[piece.index] = piece.start + len(piece.sequence.tokens)
        whole = result.sequences[piece.index]
        np.testing.assert_array_equal(piece.sequence.tokens, whole.tokens[piece.start : end])
        if topk:
            np.testing.assert_array_equal(piece.sequence.topk_tokens, whole.topk_tokens[piece.start : end])
    assert min(known.values()) >= 40


def test_what_could_not_be_said_is_said_later(house: House, tmp_path: Path) -> None:
    with closing(TokenSender(tmp_path / "l")) as sender:
        op = ask(house, stream=True, max_tokens=100)
        worker = house.worker(line=sender)
        for _ in range(4):
            worker.step()
        with closing(TokenLine(tmp_path / "l")) as line:
            worker.step()
            first = heard(line)
            settle(worker)
    assert {(piece.start, piece.index) for piece in first} == {(0, 0), (0, 1)}
    whole = decode_sample_result(house.result(op)).sequences[0].tokens
    np.testing.assert_array_equal(first[0].sequence.tokens, whole[: len(first[0].sequence.tokens)])
    assert len(first[0].sequence.tokens) > 8


def test_a_listener_leaves_out_what_it_knows_and_what_it_can_not_place(house: House) -> None:
    def piece(start: int, tokens: list[int]) -> SamplePiece:
        array = np.array(tokens, np.int32)
        return SamplePiece(OpId("x"), 0, start, replace(template, tokens=array, logprobs=array.astype(np.float32)))

    op = ask(house, stream=False)
    settle(house.worker())
    template = decode_sample_result(house.result(op)).sequences[0]
    ear = Heard()
    for start, tokens in ((0, [1, 2]), (0, [1, 2]), (5, [9]), (1, [2, 3, 4]), (4, [])):
        ear.add(piece(start, tokens))
    assert [(p.start, p.sequence.tokens.tolist()) for p in ear.take()] == [(0, [1, 2]), (2, [3, 4])]
    assert not ear.news.is_set()
