"""Tells the API of samples under way whose requests want to be streamed. The recorded result stays the truth.

A piece counts as told once its datagram was delivered, so that the listener never misses one in the middle.
"""

from __future__ import annotations

from tinsmith.engine import Engine
from tinsmith.ipc.tokenline import TokenSender
from tinsmith.types import OpId
from tinsmith.wire.pieces import pack_pieces


class Telling:
    def __init__(self, engine: Engine, line: TokenSender | None) -> None:
        """line None: nobody is told anything."""
        self._engine = engine
        self._line = line
        self._told: dict[OpId, dict[int, int]] = {}

    def begin(self, op_id: OpId) -> None:
        if self._line is not None:
            self._told[op_id] = {}

    def end(self, op_id: OpId) -> None:
        self._told.pop(op_id, None)

    def tell(self) -> None:
        """All that is new since the last call."""
        if self._line is None or not self._told:
            return
        for pieces, datagram in pack_pieces(self._engine.progress(self._told)):
            if not self._line.send(datagram):
                return
            for piece in pieces:
                self._told[piece.op_id][piece.index] = piece.start + len(piece.sequence.tokens)
