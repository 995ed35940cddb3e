"""What workers say of samples under way, for those who stream them. Nothing here is lasting: the recorded result is.

A worker that starts a request anew says everything again, from the first token; what was heard already is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from tinsmith.errors import UserError
from tinsmith.ipc.tokenline import TokenLine
from tinsmith.types import OpId, SamplePiece
from tinsmith.wire.pieces import cut_sequence, unpack_pieces

log = structlog.get_logger("tinsmith.api")


class Heard:
    """What is new of one request. `news` is set while there is something to take."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._num_known: dict[int, int] = {}
        self._new: list[SamplePiece] = []

    def take(self) -> list[SamplePiece]:
        """New pieces; each continues the one before of its sequence without a gap."""
        taken, self._new = self._new, []
        self.news.clear()
        return taken

    def add(self, piece: SamplePiece) -> None:
        known = self._num_known.get(piece.index, 0)
        end = piece.start + len(piece.sequence.tokens)
        if piece.start > known or end <= known:
            return
        fresh = cut_sequence(piece.sequence, known - piece.start)
        self._new.append(SamplePiece(piece.op_id, piece.index, known, fresh))
        self._num_known[piece.index] = end
        self.news.set()


class Pieces:
    """All requests that somebody streams. For the event loop's own thread."""

    def __init__(self, line: TokenLine | None) -> None:
        """line None: nothing is ever heard."""
        self._line = line
        self._followed: dict[OpId, Heard] = {}

    @property
    def num_followed(self) -> int:
        return len(self._followed)

    @contextmanager
    def following(self, op_id: OpId) -> Iterator[Heard]:
        """Listen for a request; begin before it can be carried out, so that no piece is missed."""
        heard = self._followed[op_id] = Heard()
        try:
            yield heard
        finally:
            del self._followed[op_id]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the line on this event loop."""
        if self._line is None:
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(self._line.fileno(), self._listen, self._line)
        try:
            yield
        finally:
            loop.remove_reader(self._line.fileno())

    def _listen(self, line: TokenLine) -> None:
        for datagram in line.heard():
            try:
                pieces = unpack_pieces(datagram)
            except UserError:
                log.warning("a datagram on the line of samples can't be read", bytes=len(datagram))
                continue
            for piece in pieces:
                if piece.op_id in self._followed:
                    self._followed[piece.op_id].add(piece)
