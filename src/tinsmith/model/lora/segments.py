"""The CPU's backend: segment by segment, in place. Nothing is padded, and no product is made of more than it needs.

With many short segments, views of tensors cost as much as the products: rows and columns are split once a group.
Shape letters: T rows of the pass, N rows of a segment, I inputs, O outputs of a group and O_l of a layer, R rank,
K = layers · R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tinsmith.model.lora.backend import LoraWeights, Segment


class SegmentsLora:
    """See `LoraPass`."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        bounds = [0, *(bound for segment in segments for bound in (segment.start, segment.end))]
        self._sizes = [end - start for start, end in pairwise(bounds)]  # a gap, a segment, a gap, ...

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for segment, x_NI, y_NO in zip(self._segments, self._rows(x_TI), self._rows(y_TO), strict=True):
            weights = segment.weights.get(group)
            if weights is None:
                continue
            u_NK = add_adapter(weights, x_NI, y_NO)
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
        rows = zip(self._rows(x_TI), self._rows(dy_TO), self._rows(dx_TI), strict=True)
        for segment, (x_NI, dy_NO, dx_NI) in zip(self._segments, rows, strict=True):
            weights = segment.weights.get(group)
            if weights is None or segment.grads is None:
                continue
            grads, u_NK, first = segment.grads[group], next(held), segment.start
            for start, end in segment.live:
                if end - start == len(u_NK):
                    add_adapter_grads(weights, grads, x_NI, u_NK, dy_NO, dx_NI)
                else:
                    own = slice(start - first, end - first)
                    add_adapter_grads(weights, grads, x_NI[own], u_NK[own], dy_NO[own], dx_NI[own])

    def _rows(self, tensor: Tensor) -> Sequence[Tensor]:
        """The rows of each segment, as views."""
        used = sum(self._sizes)
        return torch.split(tensor[:used], self._sizes)[1::2]


def add_adapter(weights: LoraWeights, x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """y += scale · (x Aᵀ) Bᵀ for rows of one adapter, in place. Returns u = x Aᵀ."""
    u_NK = torch.mm(x_NI, weights.a_KI.T)
    if y_NO.dtype != x_NI.dtype:
        parts = zip(weights.scales, torch.split(u_NK, weights.rank, 1), weights.bs, strict=True)
        y_NO += torch.cat([scale * (u_NR @ b_OR.T) for scale, u_NR, b_OR in parts], 1)
        return u_NK
    for scale, (y_NOl, b_OR, u_NR) in zip(weights.scales, _by_layer(weights, y_NO, u_NK), strict=True):
        y_NOl.addmm_(u_NR, b_OR.T, alpha=scale)
    return u_NK


def add_adapter_grads(
    weights: LoraWeights, grads: LoraWeights, x_NI: Tensor, u_NK: Tensor, dy_NO: Tensor, dx_NI: Tensor
) -> None:
    """Backward of `add_adapter`: adds to dx, and to the gradients of A and the Bs, in place.

    With g = dy B: dx += scale · g A, dA += scale · gᵀ x, dB += scale · dyᵀ u.
    """
    parts = []
    shared = weights.scale
    layers = zip(grads.bs, weights.scales, _by_layer(weights, dy_NO, u_NK), strict=True)
    for db_OR, scale, (dy_NOl, b_OR, u_NR) in layers:
        g_NR = torch.mm(dy_NOl, b_OR)
        parts.append(g_NR if shared is not None else g_NR.mul_(scale))
        db_OR.addmm_(dy_NOl.T, u_NR, alpha=scale)
    g_NK = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    left = 1.0 if shared is None else shared
    dx_NI.addmm_(g_NK, weights.a_KI, alpha=left)
    grads.a_KI.addmm_(g_NK.T, x_NI, alpha=left)


def _by_layer(weights: LoraWeights, y_NO: Tensor, u_NK: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer: its columns of y, its B, its columns of u."""
    if len(weights.bs) == 1:
        return iter([(y_NO, weights.bs[0], u_NK)])
    ys = torch.split(y_NO, [len(b_OR) for b_OR in weights.bs], 1)
    return zip(ys, weights.bs, torch.split(u_NK, weights.rank, 1), strict=True)
