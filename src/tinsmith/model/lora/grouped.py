"""LoRA by torch's grouped matrix product, for GPUs without the Triton kernels, and as a second opinion about them.

A product over rows sorted by adapter, with the adapters' matrices stacked: one call for all segments of a rank. It
wants 16-byte strides and no empty group, so ranks are padded to a multiple of 8, and only segments with rows take part.
Autograd isn't used, as it can't carry float32 sums. In bfloat16 products come back in bfloat16; gradients are added up
in float32.
Shape letters: T rows of the pass, N rows of the segments of a crowd, S segments, I inputs, O_l outputs of a layer, R
padded rank, K = layers · R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model.lora.backend import LoraWeights, Segment
from tinsmith.model.lora.tables import Span, to_device

RANK_GRID = 8

_grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of the pass, as many as `num`, a run of them for each segment of a list, end to end."""

    num: int
    index_N: Tensor
    ends_S: Tensor
    scales_NL1: Tensor

    @classmethod
    def of(cls, spans: Sequence[tuple[Sequence[float], Span]], device: torch.device) -> _Rows:
        """`spans` come with the scales of their segment's layers; none is empty."""
        lengths = [end - start for _, (start, end) in spans]
        index = np.concatenate([np.arange(start, end) for _, (start, end) in spans])
        scales = np.repeat(np.array([scales for scales, _ in spans], np.float32), lengths, 0)[..., None]
        ends = np.cumsum(lengths, dtype=np.int32)
        return cls(sum(lengths), to_device(index, device), to_device(ends, device), to_device(scales, device))

    def scale(self, u_NK: Tensor) -> Tensor:
        """Each layer's columns by its scale."""
        return (u_NK.view(self.num, self.scales_NL1.shape[1], -1) * self.scales_NL1).flatten(1)


@dataclass(frozen=True, slots=True)
class _Stack:
    """The adapters of some segments in one group. a_SKI: with K = layers · R; bs: of each layer, [S, O_l, R]."""

    a_SKI: Tensor
    bs: tuple[Tensor, ...]
    rank: int

    @classmethod
    def of(cls, weights: Sequence[LoraWeights]) -> _Stack:
        rank, layers = weights[0].rank, len(weights[0].bs)
        padding = -rank % RANK_GRID
        a_SKI = torch.stack([w.a_KI for w in weights])
        a_SLRI = F.pad(a_SKI.view(len(weights), layers, rank, -1), (0, 0, 0, padding))
        bs = tuple(F.pad(torch.stack([w.bs[layer] for w in weights]), (0, padding)) for layer in range(layers))
        return cls(a_SLRI.flatten(1, 2), bs, rank + padding)

    @property
    def widths(self) -> list[int]:
        return [b_SOR.shape[1] for b_SOR in self.bs]


class GroupedLora:
    """See `LoraPass`."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = [segment for segment in segments if segment.end > segment.start]

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for crowd in self._crowds(group):
            rows, stack, u_NK = _shrunk(crowd, group, x_TI)
            parts = zip(torch.split(u_NK, stack.rank, 1), stack.bs, strict=True)
            delta = [_times(u_NR.contiguous(), b_SOR.transpose(1, 2), rows) for u_NR, b_SOR in parts]
            y_TO.index_add_(0, rows.index_N, torch.cat(delta, 1).to(y_TO.dtype))
            if any(segment.grads is not None for segment in crowd):
                kept.append(_spread(u_NK, rows, len(x_TI)))
        return tuple(kept)

    def keep(self, group: str, x_TI: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for crowd in self._crowds(group):
            if any(segment.grads is not None for segment in crowd):
                rows, _, u_NK = _shrunk(crowd, group, x_TI)
                kept.append(_spread(u_NK, rows, len(x_TI)))
        return tuple(kept)

    def add_grads(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        crowds = [c for c in self._crowds(group) if any(s.grads is not None for s in c)]
        for crowd, u_TK in zip(crowds, kept, strict=True):
            live = [(s, span) for s in crowd if s.grads is not None for span in s.live if span[1] > span[0]]
            if live:
                self._add_live(group, live, x_TI, u_TK, dy_TO, dx_TI)

    def _add_live(
        self, group: str, live: Sequence[tuple[Segment, Span]], x_TI: Tensor, u_TK: Tensor, dy_TO: Tensor, dx_TI: Tensor
    ) -> None:
        rows = _Rows.of([(segment.weights[group].scales, span) for segment, span in live], x_TI.device)
        stack = _Stack.of([segment.weights[group] for segment, _ in live])
        dys = [dy_NO.contiguous() for dy_NO in torch.split(dy_TO[rows.index_N], stack.widths, 1)]
        us = torch.split(u_TK[rows.index_N], stack.rank, 1)
        g_NK = torch.cat([_times(dy_NO, b_SOR, rows) for dy_NO, b_SOR in zip(dys, stack.bs, strict=True)], 1)
        g_NK = rows.scale(g_NK).to(x_TI.dtype)
        dx_TI.index_add_(0, rows.index_N, _times(g_NK, stack.a_SKI, rows))
        da_SKI = _outer(g_NK, x_TI[rows.index_N], rows)
        dbs = [_outer(dy_NO, u_NR.contiguous(), rows) for dy_NO, u_NR in zip(dys, us, strict=True)]
        for index, (segment, _) in enumerate(live):
            assert segment.grads is not None
            grads = segment.grads[group]
            grads.a_KI.add_(da_SKI[index].view(len(stack.bs), stack.rank, -1)[:, : grads.rank].flatten(0, 1))
            for db_OR, db_SOR in zip(grads.bs, dbs, strict=True):
                db_OR.add_(db_SOR[index, :, : grads.rank])

    def _crowds(self, group: str) -> list[list[Segment]]:
        """The segments that have the group, by rank."""
        by_rank: dict[int, list[Segment]] = {}
        for segment in self._segments:
            if group in segment.weights:
                by_rank.setdefault(segment.weights[group].rank, []).append(segment)
        return [by_rank[rank] for rank in sorted(by_rank)]


def _shrunk(crowd: Sequence[Segment], group: str, x_TI: Tensor) -> tuple[_Rows, _Stack, Tensor]:
    """With u = scale · x Aᵀ of the crowd's rows, [N, K]."""
    rows = _Rows.of([(s.weights[group].scales, (s.start, s.end)) for s in crowd], x_TI.device)
    stack = _Stack.of([s.weights[group] for s in crowd])
    u_NK = _times(x_TI[rows.index_N], stack.a_SKI.transpose(1, 2), rows)
    return rows, stack, rows.scale(u_NK).to(x_TI.dtype)


def _spread(u_NK: Tensor, rows: _Rows, num_rows: int) -> Tensor:
    """[T, K], at the rows' own places."""
    return u_NK.new_zeros(num_rows, u_NK.shape[1]).index_copy_(0, rows.index_N, u_NK)


def _times(x_NK: Tensor, w_SKM: Tensor, rows: _Rows) -> Tensor:
    """Each segment's rows times its own matrix: [N, M]."""
    return _grouped_mm(x_NK, w_SKM, offs=rows.ends_S)


def _outer(p_NA: Tensor, q_NB: Tensor, rows: _Rows) -> Tensor:
    """Σ over each segment's rows of the outer products: [S, A, B]."""
    return _grouped_mm(p_NA.T, q_NB, offs=rows.ends_S)
