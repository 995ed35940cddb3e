"""A chunk of the output head, its data all at once: for GPUs, and for every dtype but float32.

`head` goes datum by datum, which keeps bits; here losses of one kind are evaluated over all their tokens, what the host
must know comes in one transfer, and logits, log-probabilities and losses are float32 whatever the weights are. Adapters
of the head go through the base's LoRA backend like those of any layer.
Shape letters: C rows of a chunk, M rows with a gradient, D hidden size, V vocabulary, K targets of a position, F pairs
of a row and a target, P pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import HEAD, FrozenMatrix
from tinsmith.model.final import FinalLogits
from tinsmith.model.lora import LoraBackend, Segment, masked
from tinsmith.model.lora.tables import Table, to_device
from tinsmith.training.blocks import Piece, evaluate
from tinsmith.training.dropout import mask_of_pieces
from tinsmith.training.head import not_finite
from tinsmith.training.logits import LogitOps, Pairs
from tinsmith.training.losses import Evaluation, NativeLoss
from tinsmith.types import Failure, FloatArray


@dataclass(slots=True)
class _Found:
    """Losses of a chunk as the device has them. coef_F: float32; losses_P: float64; failures: of single pieces."""

    coef_F: Tensor
    losses_P: Tensor
    metrics: dict[int, Mapping[str, float]]
    failures: dict[int, Failure]


@dataclass(frozen=True, slots=True)
class _Known:
    """What the host is told. is_bad_P: some number isn't finite; is_live_C: rows with a coefficient."""

    losses_P: FloatArray
    is_bad_P: Table
    is_live_C: Table
    lp_F: FloatArray


class BatchedChunk:
    """One chunk: its logits and what follows from them. `logprobs` of each piece's targets, [N, K] or [N]."""

    def __init__(
        self,
        matrix: FrozenMatrix,
        final: FinalLogits,
        lora: LoraBackend,
        ops: LogitOps,
        h_CD: Tensor,
        chunk: Sequence[Piece],
    ) -> None:
        self._matrix = matrix
        self._ops = ops
        self._h_CD = h_CD
        self._chunk = chunk
        self._backend = lora
        self._logits_CV = matrix.times_float32(h_CD)
        adapters = [_segment(p, p.rows.start, p.rows.stop) for p in chunk if HEAD in p.lane.op.slot.views]
        if adapters:
            masked(adapters, lora).add(HEAD, h_CD, self._logits_CV)
        final.apply_(self._logits_CV)
        self._final = final
        self._lse_C = ops.logsumexp(self._logits_CV)
        self._pairs, self._spans, self._piece_F = _pairs(chunk, h_CD.device)
        row_F = self._pairs.row_F
        self._lp_F = self._logits_CV[row_F, self._pairs.target_F] - self._lse_C[row_F]
        self.logprobs = [
            self._lp_F[span].view(piece.targets.shape) for piece, span in zip(chunk, self._spans, strict=True)
        ]

    def run(self, dh_CD: Tensor, whole: Mapping[int, Evaluation | Failure]) -> None:
        """Losses of all pieces first, then gradients of those whose op stands."""
        for piece in self._chunk:
            if piece.is_first_of_op and piece.lane.op.staging is not None:
                piece.lane.op.staging.begin_op()
        found = self._evaluate(whole)
        known = self._fetch(found)
        is_live_C = self._book(found, known, whole)
        if is_live_C.any():
            self._backward(found.coef_F, np.nonzero(is_live_C)[0], dh_CD)

    def _evaluate(self, whole: Mapping[int, Evaluation | Failure]) -> _Found:
        num = len(self._chunk)
        found = _Found(
            torch.zeros_like(self._lp_F), torch.zeros(num, dtype=torch.float64, device=self._lp_F.device), {}, {}
        )
        alike: dict[object, list[int]] = {}
        for index, piece in enumerate(self._chunk):
            loss = piece.lane.op.loss_fn
            if id(piece.lane) in whole:
                self._take(found, index, whole[id(piece.lane)], is_whole=True)
            elif isinstance(loss, NativeLoss) and loss.is_tokenwise:
                alike.setdefault((loss.key, frozenset(piece.lane.inputs)), []).append(index)
            else:
                inputs = piece.inputs() if loss.is_tokenwise else piece.lane.inputs
                self._take(found, index, evaluate(piece.lane, self.logprobs[index], inputs), is_whole=False)
        for members in alike.values():
            self._evaluate_alike(found, members)
        return found

    def _evaluate_alike(self, found: _Found, members: Sequence[int]) -> None:
        """Pieces with the same loss and settings, token by token in one call."""
        own = [self._chunk[index] for index in members]
        spans = [self._spans[index] for index in members]
        inputs = {name: torch.cat([piece.inputs()[name].reshape(-1) for piece in own]) for name in own[0].lane.inputs}
        lp_F = torch.cat([self._lp_F[span] for span in spans])
        piece_F = torch.cat([self._piece_F[span] for span in spans])
        loss = own[0].lane.op.loss_fn
        assert isinstance(loss, NativeLoss)
        terms_F, coef_F = loss.evaluate_terms(lp_F, inputs)
        found.losses_P.index_add_(0, piece_F, terms_F)
        for span, coef in zip(spans, torch.split(coef_F, [span.stop - span.start for span in spans]), strict=True):
            found.coef_F[span] = coef

    def _take(self, found: _Found, index: int, result: Evaluation | Failure, *, is_whole: bool) -> None:
        if isinstance(result, Failure):
            found.failures[index] = result
            return
        piece = self._chunk[index]
        coef = result.coef[piece.start : piece.end] if is_whole else result.coef
        found.coef_F[self._spans[index]] = coef.reshape(-1).float()
        found.losses_P[index] = result.loss
        found.metrics[index] = result.metrics

    def _fetch(self, found: _Found) -> _Known:
        num, num_rows = len(self._chunk), len(self._h_CD)
        is_finite_F = torch.isfinite(self._lp_F) & torch.isfinite(found.coef_F)
        bad_P = (~torch.isfinite(found.losses_P)).double()
        bad_P.index_add_(0, self._piece_F, (~is_finite_F).double())
        live_C = bad_P.new_zeros(num_rows).index_add_(0, self._pairs.row_F, (found.coef_F != 0).double())
        host = torch.cat([found.losses_P, bad_P, live_C, self._lp_F.double()]).cpu().numpy()
        losses_P, bad, live, lp_F = np.split(host, np.cumsum([num, num, num_rows]))
        return _Known(losses_P, bad > 0, live > 0, lp_F.astype(np.float32))

    def _book(self, found: _Found, known: _Known, whole: Mapping[int, Evaluation | Failure]) -> Table:
        """Log-probabilities, losses and failures of the pieces; returns the rows that have gradients, bool [C]."""
        is_live_C = np.zeros(len(self._h_CD), bool)
        for index, (piece, span) in enumerate(zip(self._chunk, self._spans, strict=True)):
            lane, op = piece.lane, piece.lane.op
            if op.failure is not None:
                continue
            if index in found.failures or known.is_bad_P[index]:
                op.fail(found.failures.get(index) or not_finite(lane.ref.datum, op.item.loss.name))
                continue
            op.logprobs[lane.ref.datum][piece.start : piece.end] = known.lp_F[span].reshape(piece.targets.shape)
            if id(lane) not in whole or piece.start == 0:
                op.book(float(known.losses_P[index]), found.metrics.get(index, {}))
        for piece in self._chunk:
            lane, op = piece.lane, piece.lane.op
            if op.failure is None and op.staging is not None and known.is_live_C[piece.rows].any():
                lane.is_live = True
                is_live_C[piece.rows] = known.is_live_C[piece.rows]
        return is_live_C

    def _backward(self, coef_F: Tensor, rows: Table, dh_CD: Tensor) -> None:
        """dlogits = Σ coef (onehot - p), dh = dlogits W, for the rows that have a coefficient."""
        rows_M = to_device(rows, dh_CD.device)
        dlogits_MV = self._ops.gradient(self._logits_CV, self._lse_C, self._pairs, coef_F, rows_M, self._h_CD.dtype)
        bend_MV = None if self._final.cap is None else self._final.bend(self._logits_CV[rows_M])
        self._final.chain_(dlogits_MV, bend_MV)
        dh_MD = self._matrix.times_transpose(dlogits_MV)
        self._add_lora_grad(rows, rows_M, dlogits_MV, dh_MD)
        dh_CD.index_copy_(0, rows_M, dh_MD)

    def _add_lora_grad(self, rows: Table, rows_M: Tensor, dlogits_MV: Tensor, dh_MD: Tensor) -> None:
        """The rows that are live are a pass of their own over the adapters."""
        live = []
        for piece in self._chunk:
            op = piece.lane.op
            first, last = (int(n) for n in np.searchsorted(rows, [piece.rows.start, piece.rows.stop]))
            if first == last or HEAD not in op.slot.views or op.staging is None:
                continue
            if not any(other.lane.op is op and other.is_last_of_op for other in self._chunk):
                op.staging.mark(HEAD)  # later pieces may yet fail it
            live.append(_segment(piece, first, last, rows_M[first:last] - piece.row))
        h_MD = self._h_CD[rows_M]
        lora = masked(live, self._backend)
        kept = lora.keep(HEAD, h_MD)
        if kept:
            lora.add_grads(HEAD, h_MD, kept, dlogits_MV, dh_MD)


def _segment(piece: Piece, first: int, last: int, chosen_N: Tensor | None = None) -> Segment:
    """Rows first..last-1 of what the piece's adapter is applied to; all of them live. chosen_N: which of the piece's
    rows they are, if not all."""
    slot, staging = piece.lane.op.slot, piece.lane.op.staging
    grads = None if staging is None else staging.views
    mask = mask_of_pieces([piece])
    if mask is not None and chosen_N is not None:
        mask = mask.at(chosen_N)
    return Segment(first, last, slot.views, grads, live=[(first, last)], mask=mask)


def _pairs(chunk: Sequence[Piece], device: torch.device) -> tuple[Pairs, list[slice], Tensor]:
    """The targets of a chunk, where those of each piece lie, and the piece of each, int64 [F]."""
    widths = np.array([piece.targets[0].numel() for piece in chunk])
    lengths = np.array([piece.end - piece.start for piece in chunk])
    ends = np.cumsum(widths * lengths)
    pairs_a_row = np.repeat(widths, lengths)
    first = np.concatenate([[0], np.cumsum(pairs_a_row)]).astype(np.int32)
    rows = np.repeat(np.arange(len(pairs_a_row)), pairs_a_row)
    of_piece = np.repeat(np.arange(len(chunk)), widths * lengths)
    spans = [slice(int(end - size), int(end)) for end, size in zip(ends, widths * lengths, strict=True)]
    targets_F = torch.cat([piece.targets.reshape(-1) for piece in chunk])
    pairs = Pairs(to_device(first, device), to_device(rows, device), targets_F)
    return pairs, spans, to_device(of_piece, device)
