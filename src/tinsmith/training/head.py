"""The output head and the losses: from hidden states to log-probabilities, and back to the hidden states' gradient.

Works through the rows a chunk at a time: logits, log-probabilities, losses and gradient are all made while the chunk's
logits are there, so memory grows with chunk x vocabulary. A datum whose loss ties its tokens together is a chunk of its
own up to a bound; beyond it the logits are made twice. What stays true: a chunk holds whole pieces, and every
elementwise kernel whose rounding depends on where an array ends runs on one block (`training/blocks.py`).
Shape letters: T rows of the pack, C rows of a chunk, M rows with a gradient, N rows of a block, K targets a position,
D hidden size, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model import HEAD, FrozenMatrix, padded_rows
from tinsmith.model.final import FinalLogits
from tinsmith.model.lora.masks import RowMask
from tinsmith.model.lora.segments import add_adapter, add_adapter_grads
from tinsmith.training.blocks import Block, Piece, evaluate, is_finite, make_blocks
from tinsmith.training.dropout import mask_of_pieces
from tinsmith.training.lanes import Lane
from tinsmith.training.losses import TARGETS, Evaluation
from tinsmith.training.packing import pieces
from tinsmith.types import Failure

WHOLE_BYTES = 256 * 2**20
CACHED_LOGITS = 2**19  # 2 MiB of logits are gone over three times while a core's cache holds them


class AnyChunkPass(Protocol):
    """One chunk of rows: its log-probabilities on being made, its losses and gradients on `run`."""

    logprobs: list[Tensor]

    def run(self, dh_CD: Tensor, whole: Mapping[int, Evaluation | Failure]) -> None:
        """Fill in the chunk's rows of dh; `whole`: losses of data that span chunks, by id of their lane."""
        ...


ChunkPassMaker = Callable[[Tensor, Sequence[Piece]], AnyChunkPass]


class Head:
    """The head of one base. `chunk_tokens` bounds the rows whose logits are held at once; `make_pass` computes a chunk,
    another one than this module's on other devices and in other dtypes."""

    def __init__(
        self,
        matrix: FrozenMatrix,
        final: FinalLogits,
        chunk_tokens: int,
        *,
        deterministic: bool,
        make_pass: ChunkPassMaker | None = None,
    ) -> None:
        self._matrix = matrix
        self._final = final
        self._may_merge = not deterministic
        self._pass = make_pass or self._blockwise
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
            self._pass(h_TD[start:end], chunk).run(dh_TD[start:end], whole)
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

    def _blockwise(self, h_CD: Tensor, chunk: Sequence[Piece]) -> _ChunkPass:
        return _ChunkPass(self._matrix, self._final, h_CD, make_blocks(chunk, may_merge=self._may_merge))

    def _evaluate_whole(self, h_TD: Tensor, lane: Lane) -> Evaluation | Failure:
        """The loss and coefficients of a datum that spans chunks; its logits are made a second time afterwards."""
        parts = []
        for start, end in pieces(lane.ref.num_tokens, self._chunk_tokens):
            rows = slice(lane.start + start, lane.start + end)
            piece = Piece(lane, start, end, 0)
            parts.append(self._pass(h_TD[rows], [piece]).logprobs[0])
        return evaluate(lane, torch.cat(parts), lane.inputs)


class _ChunkPass:
    """One chunk: its logits and what follows from them.

    `logprobs` are those of the targets of each block, [N, K] or [N]. One tensor holds the logits, then the
    probabilities, then the gradient of the logits; where a position has one target, all but its coefficient, by which
    the product's D numbers are multiplied and not its V.
    """

    def __init__(self, matrix: FrozenMatrix, final: FinalLogits, h_CD: Tensor, blocks: Sequence[Block]) -> None:
        self._matrix = matrix
        self._final = final
        self._h_CD = h_CD
        self._blocks = blocks
        self._shrunk: dict[int, Tensor] = {}
        self._masks: dict[int, RowMask] = {}
        logits_CV = self._make_logits()
        target_logits = [logits_CV[block.rows].gather(1, _rows_by_k(block.targets)) for block in blocks]
        top_C, top_prob_C = _to_probs(logits_CV)
        self._probs_CV = logits_CV
        self.logprobs = [
            _logprobs(logits_NK, top_C[block.rows], top_prob_C[block.rows]).view(block.targets.shape)
            for block, logits_NK in zip(blocks, target_logits, strict=True)
        ]

    def run(self, dh_CD: Tensor, whole: Mapping[int, Evaluation | Failure]) -> None:
        """Losses of all blocks first, then gradients of those whose op stands."""
        coefs: list[Tensor | None] = []
        for block, lp in zip(self._blocks, self.logprobs, strict=True):
            if block.is_first_of_op and block.op.staging is not None:
                block.op.staging.begin_op()
            coefs.append(self._evaluate(block, lp, whole.get(id(block.pieces[0].lane))))
        live = [
            (block, coef)
            for block, coef in zip(self._blocks, coefs, strict=True)
            if coef is not None and block.op.failure is None
        ]
        if live:
            self._backward(live, dh_CD)

    def _make_logits(self) -> Tensor:
        num_rows = len(self._h_CD)
        h_CD = F.pad(self._h_CD, (0, 0, 0, padded_rows(num_rows) - num_rows))
        self._padded_CV = self._matrix.times(h_CD)
        logits_CV = self._padded_CV[:num_rows]
        for block in self._blocks:
            slot = block.op.slot
            if HEAD in slot.views:
                mask = mask_of_pieces(block.pieces)
                if mask is not None:
                    self._masks[id(block)] = mask
                h_ND = self._h_CD[block.rows] if mask is None else mask.times(HEAD, self._h_CD[block.rows])
                self._shrunk[id(block)] = add_adapter(slot.views[HEAD], h_ND, logits_CV[block.rows])
            self._final.apply_(logits_CV[block.rows])
        self._bend_CV = self._final.bend(self._padded_CV)
        return logits_CV

    def _evaluate(self, block: Block, lp: Tensor, whole: Evaluation | Failure | None) -> Tensor | None:
        """Book the block's log-probabilities and loss; its coefficients [N, K], or None if there's nothing to add.

        whole: what was found for the whole datum, if this is but a piece of one whose loss ties its tokens together.
        """
        op, first = block.op, block.pieces[0]
        if op.failure is not None:
            return None
        found = block.evaluate(lp) if whole is None else whole
        if isinstance(found, Failure):
            op.fail(found)
            return None
        if whole is not None:
            found = replace(found, coef=found.coef[first.start : first.end])
        if not is_finite(found, lp):
            op.fail(not_finite(first.lane.ref.datum if whole else block.first_not_finite(lp), op.item.loss.name))
            return None
        block.book_logprobs(lp)
        if whole is None or first.start == 0:
            op.book(found.loss, found.metrics)
        coef_NK = _rows_by_k(found.coef)
        if op.staging is None or not bool(coef_NK.any()):
            return None
        block.mark_live(coef_NK)
        return coef_NK

    def _backward(self, live: Sequence[tuple[Block, Tensor]], dh_CD: Tensor) -> None:
        """dlogits = Σ_k coef_k (onehot_k - p), dh = dlogits W, for the rows that have a coefficient."""
        rows = [block.row + coef_NK.any(-1).nonzero()[:, 0] for block, coef_NK in live]
        rows_M = torch.cat(rows)
        num_rows = padded_rows(len(rows_M))
        if len(rows_M) == len(self._h_CD):
            dlogits_MV, bend_MV = self._padded_CV, self._bend_CV  # what was added are rows of zeros
        else:
            padded_M = F.pad(rows_M, (0, num_rows - len(rows_M)))
            dlogits_MV = self._probs_CV.index_select(0, padded_M)
            bend_MV = None if self._bend_CV is None else self._bend_CV.index_select(0, padded_M)
        offset = 0
        spans: list[slice] = []
        factor_M1 = dlogits_MV.new_ones(len(dlogits_MV), 1)
        for (block, coef_NK), rows_N in zip(live, rows, strict=True):
            inner_N = rows_N - block.row
            span = slice(offset, offset + len(rows_N))
            coef_NK, targets_NK = coef_NK[inner_N], _rows_by_k(block.targets[inner_N])
            if coef_NK.shape[1] == 1 and HEAD not in block.op.slot.views:
                dlogits_MV[span].scatter_add_(1, targets_NK, coef_NK.new_full(coef_NK.shape, -1.0))
                torch.neg(coef_NK, out=factor_M1[span])
            else:
                _to_dlogits(dlogits_MV[span], coef_NK, targets_NK)
            spans.append(span)
            offset = span.stop
        self._final.chain_(dlogits_MV, bend_MV)
        dh_MD = self._matrix.times_transpose(dlogits_MV).mul_(factor_M1)
        ending = {id(block.op) for block in self._blocks if block.is_last_of_op}
        for (block, _), rows_N, span in zip(live, rows, spans, strict=True):
            if HEAD in block.op.slot.views:
                may_fail = id(block.op) not in ending
                self._add_lora_grad(block, rows_N, dlogits_MV[span], dh_MD[span], may_fail=may_fail)
        dh_CD.index_copy_(0, rows_M, dh_MD[: len(rows_M)])

    def _add_lora_grad(
        self, block: Block, rows_N: Tensor, dlogits_NV: Tensor, dh_ND: Tensor, *, may_fail: bool
    ) -> None:
        """may_fail: pieces of its op are yet to come, with which it may fail."""
        op = block.op
        assert op.staging is not None
        if may_fail:
            op.staging.mark(HEAD)
        u_NR, h_ND = self._shrunk[id(block)][rows_N - block.row], self._h_CD[rows_N]
        weights, grads = op.slot.views[HEAD], op.staging.views[HEAD]
        if id(block) not in self._masks:
            add_adapter_grads(weights, grads, h_ND, u_NR, dlogits_NV, dh_ND)
            return
        mask, own_ND = self._masks[id(block)].at(rows_N - block.row), torch.zeros_like(dh_ND)
        add_adapter_grads(weights, grads, mask.times(HEAD, h_ND), u_NR, dlogits_NV, own_ND)
        dh_ND += mask.times(HEAD, own_ND)


def _to_probs(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of each row, in place. Returns: the greatest logit of each row, and the greatest probability, [C]."""
    num_rows, vocab = logits_CV.shape
    top_C, top_prob_C = logits_CV.new_empty(num_rows), logits_CV.new_empty(num_rows)
    step = max(1, torch.get_num_threads() * CACHED_LOGITS // vocab)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        torch.amax(logits_CV[rows], -1, out=top_C[rows])
        # each element of a row is read before it's written
        torch.softmax(logits_CV[rows], -1, out=logits_CV[rows])
        torch.amax(logits_CV[rows], -1, out=top_prob_C[rows])
    return top_C, top_prob_C


def _to_dlogits(probs_NV: Tensor, coef_NK: Tensor, targets_NK: Tensor) -> None:
    """Turn probabilities into the gradient of the logits, in place."""
    probs_NV.mul_(-coef_NK.sum(-1, keepdim=True))
    probs_NV.scatter_add_(1, targets_NK, coef_NK)


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
