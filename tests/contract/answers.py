"""A worker that answers sample requests with given text, for tests of what the endpoints make of it."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import numpy as np

from tests.service import until
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.ipc.tokenline import TokenSender, line_path
from tinsmith.store.rows import Finished, OpRow
from tinsmith.types import Failure, OpId, OpState, SampledSequence, SamplePiece, SampleResult
from tinsmith.wire.media import JSON
from tinsmith.wire.pieces import pack_pieces
from tinsmith.wire.sampling import SampleRequest, decode_sample, encode_sample_result

TOKENIZER = ChatTokenizer.from_dir(SHIPPED_PATH)
END = 1000


class Answers:
    """What the house's worker says: `text`, then the end token if `ends`; `pieces` (tokens) are told before.

    `asked` are the requests as they came to the worker, newest last.
    """

    def __init__(self, house: Any, worker: Any) -> None:
        self.text = "Hello."
        self.ends = True
        self.failure: Failure | None = None
        self.pieces: list[list[int]] = []
        self.asked: list[SampleRequest] = []
        self.ops: list[OpRow] = []
        self._house = house
        self._worker = worker
        self._finish = worker._outcome
        worker._outcome = self._outcome
        worker.start()

    @property
    def prompt(self) -> str:
        return TOKENIZER.decode(self.asked[-1].prompt.tolist())

    def _outcome(self, op: OpRow) -> Finished:
        if op.kind != "sample":
            return self._finish(op)
        asked = decode_sample(self._worker._payload(op))
        self.asked.append(asked)
        self.ops.append(op)
        if op.meta.get("stream"):
            self._tell(op.id)
        if self.failure is not None:
            return Finished(op.id, OpState.FAILED, media=JSON, failure=self.failure)
        sequence = self._sequence(TOKENIZER.encode(self.text) + [END] * self.ends)
        body = encode_sample_result(SampleResult((sequence,) * asked.num_samples))
        return Finished(op.id, OpState.DONE, result=body, result_bytes=len(body), media="application/x-protobuf")

    def _tell(self, op_id: OpId) -> None:
        start = 0
        with closing(TokenSender(line_path(self._house.root / "api.sock"))) as sender:
            for tokens in self.pieces:
                for _, datagram in pack_pieces([SamplePiece(op_id, 0, start, self._sequence(tokens))]):
                    until(lambda datagram=datagram: sender.send(datagram), 5)
                start += len(tokens)
        time.sleep(0.1 if self.pieces else 0)  # for the pieces to be heard first

    def _sequence(self, tokens: list[int]) -> SampledSequence:
        return SampledSequence(np.array(tokens, np.int32), np.full(len(tokens), -0.5, np.float32), self.ends)
