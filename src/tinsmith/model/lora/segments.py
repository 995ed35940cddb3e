"""The CPU's backend: segment by segment, in place. Nothing is padded, and no product is made of more than it needs.

Shape letters: T rows of the pass, N rows of a segment, I inputs, O outputs of a group, R rank, K = layers · R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.model.lora.backend import LoraWeights, Segment


class SegmentsLora:
    """See `LoraPass`."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for segment in self._segments:
            weights = segment.weights.get(group)
            if weights is None:
                continue
            u_NK = add_adapter(
                weights, x_TI[segment.start : segment.end], y_TO[segment.start : segment.end], segment.scale
            )
            if segment.grads is not None:
                kept.append(u_NK)
        return tuple(kept)

    def keep(self, group: str, x_TI: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            x_TI[segment.start : segment.end] @ segment.weights[group].a_KI.T
            for segment in self._segments
            if segment.grads is not None and group in segment.weights
        )

    def add_grads(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        held = iter(kept)
        for segment in self._segments:
            weights = segment.weights.get(group)
            if weights is None or segment.grads is None:
                continue
            u_NK = next(held)
            for start, end in segment.live:
                add_adapter_grads(
                    weights,
                    segment.grads[group],
                    x_TI[start:end],
                    u_NK[start - segment.start : end - segment.start],
                    dy_TO[start:end],
                    dx_TI[start:end],
                    segment.scale,
                )


def add_adapter(weights: LoraWeights, x_NI: Tensor, y_NO: Tensor, scale: float) -> Tensor:
    """y += scale · (x Aᵀ) Bᵀ for rows of one adapter, in place. Returns u = x Aᵀ."""
    u_NK = x_NI @ weights.a_KI.T
    if y_NO.dtype != x_NI.dtype:
        us = torch.split(u_NK, weights.rank, 1)
        y_NO += scale * torch.cat([u_NR @ b_OR.T for u_NR, b_OR in zip(us, weights.bs, strict=True)], 1)
        return u_NK
    if len(weights.bs) == 1:
        y_NO.addmm_(u_NK, weights.bs[0].T, alpha=scale)
        return u_NK
    column = 0
    for b_OR, u_NR in zip(weights.bs, torch.split(u_NK, weights.rank, 1), strict=True):
        y_NO[:, column : column + len(b_OR)].addmm_(u_NR, b_OR.T, alpha=scale)
        column += len(b_OR)
    return u_NK


def add_adapter_grads(
    weights: LoraWeights, grads: LoraWeights, x_NI: Tensor, u_NK: Tensor, dy_NO: Tensor, dx_NI: Tensor, scale: float
) -> None:
    """Backward of `add_adapter`: adds to dx, and to the gradients of A and the Bs, in place."""
    rank = weights.rank
    g_NK = u_NK.new_empty(u_NK.shape)
    column = 0
    for layer, (b_OR, db_OR) in enumerate(zip(weights.bs, grads.bs, strict=True)):
        dy = dy_NO[:, column : column + len(b_OR)]
        part = slice(layer * rank, (layer + 1) * rank)
        g_NK[:, part].addmm_(dy, b_OR, beta=0, alpha=scale)
        db_OR.addmm_(dy.T, u_NK[:, part], alpha=scale)
        column += len(b_OR)
    dx_NI.addmm_(g_NK, weights.a_KI)
    grads.a_KI.addmm_(g_NK.T, x_NI)
