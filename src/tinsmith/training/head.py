"""The output head and the losses: from hidden states to log-probabilities, and back to the hidden states' gradient.

Works through the rows a chunk at a time: logits, log-probabilities, losses and gradient are all made while the chunk's
logits are there, so memory grows with chunk x vocabulary. A datum whose loss ties its tokens together is a chunk of its
own up to a bound; beyond it the logits are made twice. What stays true: a chunk holds whole pieces, a piece depends
on its datum alone, and every elementwise kernel whose rounding depends on where an array ends runs on one piece.
Shape letters: T rows of the pack, C rows of a chunk, M rows with a gradient, N rows of a piece, K targets a position,
D hidden size, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.model import HEAD, FrozenMatrix, padded_rows
from tinsmith.model.lora.segments import add_adapter, add_adapter_grads
from tinsmith.training.lanes import Lane
from tinsmith.training.losses import TARGETS, Evaluation
from tinsmith.training.packing import pieces
from tinsmith.types import Failure

WHOLE_BYTES = 256 * 2**20


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

    def evaluate(self, lp: Tensor) -> Evaluation | Failure:
        """The loss on these rows, which are all of the datum unless it goes token by token."""
        if not self.lane.op.loss_fn.is_tokenwise:
            return evaluate(self.lane, lp)
        return evaluate(self.lane, lp, self.inputs())

    def inputs(self) -> dict[str, Tensor]:
        return {name: tensor[self.start : self.end] for name, tensor in self.lane.inputs.items()}


class AnyChunkPass(Protocol):
    """One chunk of rows: its log-probabilities on being made, its losses and gradients on `run`."""

    logprobs: list[Tensor]

    def run(self, dh_CD: Tensor, whole: Mapping[int, Evaluation | Failure]) -> None:
        """Fill in the chunk's rows of dh; `whole`: losses of data that span chunks, by id of their lane."""
        ...


ChunkPassMaker = Callable[[Tensor, Sequence[Piece]], AnyChunkPass]


class Head:
    """The head of one base. `chunk_tokens` bounds the rows whose logits are held at once."""

    def __init__(self, matrix: FrozenMatrix, chunk_tokens: int, make_pass: ChunkPassMaker | None = None) -> None:
        self._matrix = matrix
        self._make_pass = make_pass or partial(ChunkPass, matrix)
        self._chunk_tokens = chunk_tokens
        self._whole_tokens = max(chunk_tokens, WHOLE_BYTES // (matrix.out_features * matrix.dtype.itemsize))

    def run(self, h_TD: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """Fill in log-probabilities, losses and failures of the lanes' ops, and add the head's adapter gradients.

        Args:
            h_TD: hidden states, without autograd; the lanes' rows lie end to end from row 0.

        Returns:
            The losses' gradient with respect to h, [T, D]; zero in rows of ops that failed or want no gradient.
        """
        dh_TD = torch.zeros_like(h_TD)
        for lane in lanes:
            lane.op.logprobs[lane.ref.datum] = np.empty(lane.inputs[TARGETS].shape, np.float32)
        whole = {id(lane): self._evaluate_whole(h_TD, lane) for lane in lanes if self._is_coupled(lane)}
        start = 0
        for chunk in self._chunks(lanes):
            end = start + chunk[-1].rows.stop
            self._make_pass(h_TD[start:end], chunk).run(dh_TD[start:end], whole)
            start = end
        for lane in lanes:
            if lane.op.failure is not None:
                lane.is_live = False
                dh_TD[lane.start : lane.end] = 0
        return dh_TD

    def _chunks(self, lanes: Sequence[Lane]) -> Iterator[list[Piece]]:
        chunk: list[Piece] = []
        filled = 0
        for lane in lanes:
            for start, end in pieces(lane.ref.num_tokens, self._piece_tokens(lane)):
                if chunk and filled + end - start > self._chunk_tokens:
                    yield chunk
                    chunk, filled = [], 0
                chunk.append(Piece(lane, start, end, filled))
                filled += end - start
        if chunk:
            yield chunk

    def _is_coupled(self, lane: Lane) -> bool:
        """The loss ties tokens of different chunks, so all log-probabilities are needed before any coefficient."""
        return lane.ref.num_tokens > self._whole_tokens and not lane.op.loss_fn.is_tokenwise

    def _piece_tokens(self, lane: Lane) -> int:
        """The longest piece of a datum: a whole one, if its loss needs that and it is short enough."""
        is_whole = not lane.op.loss_fn.is_tokenwise and lane.ref.num_tokens <= self._whole_tokens
        return self._whole_tokens if is_whole else self._chunk_tokens

    def _evaluate_whole(self, h_TD: Tensor, lane: Lane) -> Evaluation | Failure:
        """The loss and coefficients of a datum that spans chunks; its logits are made a second time afterwards."""
        parts = []
        for start, end in pieces(lane.ref.num_tokens, self._chunk_tokens):
            rows = slice(lane.start + start, lane.start + end)
            piece = Piece(lane, start, end, 0)
            parts.append(self._make_pass(h_TD[rows], [piece]).logprobs[0])
        return evaluate(lane, torch.cat(parts))


class ChunkPass:
    """One chunk: its logits and what follows from them.

    `logprobs` are those of the targets of each piece, [N, K] or [N]. One tensor holds the logits, then the
    probabilities, then the gradient of the logits.
    """

    def __init__(self, matrix: FrozenMatrix, h_CD: Tensor, chunk: Sequence[Piece]) -> None:
        self._matrix = matrix
        self._h_CD = h_CD
        self._chunk = chunk
        self._shrunk: dict[int, Tensor] = {}
        logits_CV = self._make_logits()
        top_C = logits_CV.amax(-1)
        target_logits = [logits_CV[piece.rows].gather(1, _rows_by_k(piece.targets)) for piece in chunk]
        self._probs_CV = torch.softmax(
            logits_CV, -1, out=logits_CV
        )  # each element of a row is read before it's written
        top_prob_C = self._probs_CV.amax(-1)
        self.logprobs = [
            _logprobs(logits_NK, top_C[piece.rows], top_prob_C[piece.rows]).view(piece.targets.shape)
            for piece, logits_NK in zip(chunk, target_logits, strict=True)
        ]

    def run(self, dh_CD: Tensor, whole: Mapping[int, Evaluation | Failure]) -> None:
        """Losses of all pieces first, then gradients of those whose op stands."""
        coefs: list[Tensor | None] = []
        for piece, lp in zip(self._chunk, self.logprobs, strict=True):
            if piece.is_first_of_op and piece.lane.op.staging is not None:
                piece.lane.op.staging.begin_op()
            coefs.append(self._evaluate(piece, lp, whole.get(id(piece.lane))))
        live = [
            (piece, coef)
            for piece, coef in zip(self._chunk, coefs, strict=True)
            if coef is not None and piece.lane.op.failure is None
        ]
        if live:
            self._backward(live, dh_CD)

    def _make_logits(self) -> Tensor:
        num_rows = len(self._h_CD)
        h_CD = F.pad(self._h_CD, (0, 0, 0, padded_rows(num_rows) - num_rows))
        self._padded_CV = self._matrix.times(h_CD)
        logits_CV = self._padded_CV[:num_rows]
        for piece in self._chunk:
            slot = piece.lane.op.slot
            if HEAD in slot.views:
                rows = piece.rows
                self._shrunk[id(piece)] = add_adapter(slot.views[HEAD], self._h_CD[rows], logits_CV[rows], slot.scale)
        return logits_CV

    def _evaluate(self, piece: Piece, lp: Tensor, whole: Evaluation | Failure | None) -> Tensor | None:
        """Book the piece's log-probabilities and loss; its coefficients [N, K], or None if there's nothing to add."""
        lane, op = piece.lane, piece.lane.op
        if op.failure is not None:
            return None
        found = piece.evaluate(lp) if whole is None else whole
        if isinstance(found, Failure):
            op.fail(found)
            return None
        loss, coef = found.loss, found.coef if whole is None else found.coef[piece.start : piece.end]
        if not (np.isfinite(loss) and bool(torch.isfinite(coef).all()) and bool(torch.isfinite(lp).all())):
            op.fail(not_finite(lane.ref.datum, op.item.loss.name))
            return None
        op.logprobs[lane.ref.datum][piece.start : piece.end] = lp.cpu().numpy()
        if whole is None or piece.start == 0:
            op.book(loss, found.metrics)
        if op.staging is None or not bool(coef.any()):
            return None
        lane.is_live = True
        return coef.view(len(coef), -1)

    def _backward(self, live: Sequence[tuple[Piece, Tensor]], dh_CD: Tensor) -> None:
        """dlogits = Σ_k coef_k (onehot_k - p), dh = dlogits W, for the rows that have a coefficient."""
        rows = [piece.row + coef_NK.any(-1).nonzero()[:, 0] for piece, coef_NK in live]
        rows_M = torch.cat(rows)
        num_rows = padded_rows(len(rows_M))
        if len(rows_M) == len(self._h_CD):
            dlogits_MV = self._padded_CV  # what was added are rows of zeros
        else:
            dlogits_MV = self._probs_CV.index_select(0, F.pad(rows_M, (0, num_rows - len(rows_M))))
        offset = 0
        spans: list[slice] = []
        for (piece, coef_NK), rows_N in zip(live, rows, strict=True):
            inner_N = rows_N - piece.row
            span = slice(offset, offset + len(rows_N))
            _to_dlogits(dlogits_MV[span], coef_NK[inner_N], piece.targets[inner_N])
            spans.append(span)
            offset = span.stop
        dh_MD = self._matrix.times_transpose(dlogits_MV)
        for (piece, _), rows_N, span in zip(live, rows, spans, strict=True):
            self._add_lora_grad(piece, rows_N, dlogits_MV[span], dh_MD[span])
        dh_CD.index_copy_(0, rows_M, dh_MD[: len(rows_M)])

    def _add_lora_grad(self, piece: Piece, rows_N: Tensor, dlogits_NV: Tensor, dh_ND: Tensor) -> None:
        op = piece.lane.op
        if op.staging is None or HEAD not in op.slot.views:
            return
        if not any(other.lane.op is op and other.is_last_of_op for other in self._chunk):
            op.staging.mark(HEAD)  # later pieces may yet fail it
        u_NR = self._shrunk[id(piece)][rows_N - piece.row]
        grads = op.staging.views[HEAD]
        add_adapter_grads(op.slot.views[HEAD], grads, self._h_CD[rows_N], u_NR, dlogits_NV, dh_ND, op.slot.scale)


def evaluate(lane: Lane, lp: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Evaluation | Failure:
    """The lane's loss on log-probabilities of it; `inputs`: those of these rows, if they aren't the whole datum."""
    try:
        return lane.op.loss_fn.evaluate(lp, lane.inputs if inputs is None else inputs)
    except UserError as error:
        message = f"datum {lane.ref.datum}: {error.message}"
        return Failure(code=error.code, category=error.category, message=message)


def _to_dlogits(probs_NV: Tensor, coef_NK: Tensor, targets: Tensor) -> None:
    """Turn probabilities into the gradient of the logits, in place."""
    probs_NV.mul_(-coef_NK.sum(-1, keepdim=True))
    probs_NV.scatter_add_(1, _rows_by_k(targets), coef_NK)


def _logprobs(target_logits_NK: Tensor, top_N: Tensor, top_prob_N: Tensor) -> Tensor:
    """logit - max + log p(max), which is logit - logsumexp. The clone gives log an array of this piece alone."""
    return (target_logits_NK - top_N[:, None]) + torch.log(top_prob_N.clone())[:, None]


def _rows_by_k(targets: Tensor) -> Tensor:
    """[N] or [N, K] -> [N, K]."""
    return targets.view(len(targets), -1)


def not_finite(datum: int, loss: str) -> Failure:
    return Failure(
        code="non_finite_loss",
        category="user",
        message=f"datum {datum}: the {loss} loss, its gradient or a log-probability is not finite, and the request "
        "had no effect: look for extreme inputs, or load an earlier checkpoint and lower the learning rate",
    )
