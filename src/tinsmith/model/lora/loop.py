"""The plain loop: one segment and one layer at a time, in the words of the formula. The oracle of the other backends.

Shape letters: T rows of the pass, N rows of a segment, I inputs, O outputs of a group, R rank, K = layers · R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.model.lora.backend import Segment


class LoopLora:
    """See `LoraPass`."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for segment in self._segments:
            if group not in segment.weights:
                continue
            weights, rows = segment.weights[group], slice(segment.start, segment.end)
            u_NK = x_TI[rows] @ weights.a_KI.T
            us = torch.split(u_NK, weights.rank, 1)
            parts = zip(weights.scales, us, weights.bs, strict=True)
            y_TO[rows] += torch.cat([scale * (u_NR @ b_OR.T) for scale, u_NR, b_OR in parts], 1)
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
        own = [s for s in self._segments if s.grads is not None and group in s.weights]
        for segment, u_NK in zip(own, kept, strict=True):
            assert segment.grads is not None
            weights, grads = segment.weights[group], segment.grads[group]
            widths = [len(b_OR) for b_OR in weights.bs]
            for start, end in segment.live:
                rows, x_NI = slice(start, end), x_TI[start:end]
                plain = torch.split(dy_TO[rows], widths, 1)
                dys = [scale * dy_NO for scale, dy_NO in zip(weights.scales, plain, strict=True)]
                us = torch.split(u_NK[start - segment.start : end - segment.start], weights.rank, 1)
                g_NK = torch.cat([dy_NO @ b_OR for dy_NO, b_OR in zip(dys, weights.bs, strict=True)], 1)
                dx_TI[rows] += g_NK @ weights.a_KI
                grads.a_KI.add_(g_NK.T @ x_NI)
                for db_OR, dy_NO, u_NR in zip(grads.bs, dys, us, strict=True):
                    db_OR.add_(dy_NO.T @ u_NR)
