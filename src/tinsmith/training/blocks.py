"""Which rows of a chunk of logits are computed together: pieces of data, and blocks of pieces.

In deterministic mode a block is one piece, which depends on its datum alone. Otherwise neighbouring pieces of one
request are one block if its loss goes token by token, so that many short data cost little more than one long one.
Shape letters: N rows of a piece or block, K targets a position.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.training.lanes import Lane, OpProgress
from tinsmith.training.losses import TARGETS, Evaluation
from tinsmith.types import Failure


@dataclass(slots=True)
class Piece:
    """Rows `start..end` of a lane's datum, which are rows `row..` of the chunk it lies in."""

    lane: Lane
    start: int
    end: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.end - self.start)

    @property
    def is_first_of_op(self) -> bool:
        return self.lane.ref.datum == 0 and self.start == 0

    @property
    def is_last_of_op(self) -> bool:
        ref = self.lane.ref
        return ref.datum == len(self.lane.op.item.data) - 1 and self.end == ref.num_tokens

    @property
    def targets(self) -> Tensor:
        return self.lane.inputs[TARGETS][self.start : self.end]

    def inputs(self) -> dict[str, Tensor]:
        return {name: tensor[self.start : self.end] for name, tensor in self.lane.inputs.items()}


class Block:
    """Pieces of one op, side by side in the chunk. All of a datum, unless its loss goes token by token."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.op: OpProgress = pieces[0].lane.op
        self.row = pieces[0].row
        self.rows = slice(self.row, pieces[-1].rows.stop)
        first = pieces[0]
        self._inputs = _joined([p.inputs() for p in pieces]) if self.op.loss_fn.is_tokenwise else first.lane.inputs
        self.targets = self._inputs[TARGETS]
        if not self.op.loss_fn.is_tokenwise:
            self.targets = self.targets[first.start : first.end]

    @property
    def is_first_of_op(self) -> bool:
        return self.pieces[0].is_first_of_op

    @property
    def is_last_of_op(self) -> bool:
        return self.pieces[-1].is_last_of_op

    def evaluate(self, lp: Tensor) -> Evaluation | Failure:
        """The loss on these rows, given their log-probabilities [N, K] or [N]."""
        return evaluate(self.pieces[0].lane, lp, self._inputs)

    def first_not_finite(self, lp: Tensor) -> int:
        """The datum to be named for a loss, coefficient or log-probability that isn't finite."""
        for piece in self.pieces:
            own = lp[piece.row - self.row : piece.rows.stop - self.row]
            if len(self.pieces) > 1 and is_finite(evaluate(piece.lane, own, piece.inputs()), own):
                continue
            return piece.lane.ref.datum
        return self.pieces[0].lane.ref.datum

    def book_logprobs(self, lp: Tensor) -> None:
        host = lp.cpu().numpy()
        for piece in self.pieces:
            own = host[piece.row - self.row : piece.rows.stop - self.row]
            self.op.logprobs[piece.lane.ref.datum][piece.start : piece.end] = own

    def mark_live(self, coef_NK: Tensor) -> None:
        """Note which data have a coefficient that isn't zero."""
        has_N = coef_NK.any(-1).cpu().numpy()
        for piece in self.pieces:
            if has_N[piece.row - self.row : piece.rows.stop - self.row].any():
                piece.lane.is_live = True


def make_blocks(pieces: Iterable[Piece], *, may_merge: bool) -> list[Block]:
    """The pieces of a chunk by block, in order."""
    parts: list[list[Piece]] = []
    for piece in pieces:
        if may_merge and parts and _may_join(parts[-1][0].lane, piece.lane):
            parts[-1].append(piece)
        else:
            parts.append([piece])
    return [Block(part) for part in parts]


def evaluate(lane: Lane, lp: Tensor, inputs: dict[str, Tensor]) -> Evaluation | Failure:
    """The loss of the lane's op on some rows; a failure names the lane's datum."""
    try:
        return lane.op.loss_fn.evaluate(lp, inputs)
    except UserError as error:
        message = f"datum {lane.ref.datum}: {error.message}"
        return Failure(code=error.code, category=error.category, message=message)


def is_finite(found: Evaluation | Failure, lp: Tensor) -> bool:
    """Whether a loss, its coefficients and the log-probabilities under it all are."""
    if isinstance(found, Failure):
        return False
    return bool(np.isfinite(found.loss) and torch.isfinite(found.coef).all() and torch.isfinite(lp).all())


def _may_join(one: Lane, other: Lane) -> bool:
    return (
        one.op is other.op
        and one.op.loss_fn.is_tokenwise
        and one.inputs.keys() == other.inputs.keys()
        and all(array.shape[1:] == other.inputs[name].shape[1:] for name, array in one.inputs.items())
    )


def _joined(inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return inputs[0] if len(inputs) == 1 else {name: torch.cat([own[name] for own in inputs]) for name in inputs[0]}
