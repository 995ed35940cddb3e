"""Masks before the inputs of adapters, for any backend: the segments that have one are a pass of their own.

Rows without a mask go by the backend as if the others weren't there.
Shape letters: T rows of a pass, N rows that have a mask, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.model.lora.backend import LoraBackend, LoraPass, Segment
from tinsmith.model.lora.masks import RowMask


class MaskedLora:
    """See `LoraPass`. The segments that have a mask are a pass of their own."""

    def __init__(self, segments: Sequence[Segment], backend: LoraBackend) -> None:
        masked = [(segment, segment.mask) for segment in segments if segment.mask is not None]
        self._plain = backend([segment for segment in segments if segment.mask is None])
        self._masked = backend([segment for segment, _ in masked])
        self._segments = [segment for segment, _ in masked]
        self._mask = RowMask.joined([mask for _, mask in masked])
        device = self._mask.row_N.device
        self._rows_N = torch.cat([torch.arange(s.start, s.end, device=device) for s in self._segments])
        self._num_plain: dict[str, int] = {}

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        kept = self._plain.add(group, x_TI, y_TO)
        self._num_plain[group] = len(kept)
        if not self._has(group):
            return kept
        left_TI = self._left(x_TI, self._mask.left_out(group, x_TI.shape[1]))
        return kept + self._masked.add(group, left_TI, y_TO)

    def keep(self, group: str, x_TI: Tensor) -> tuple[Tensor, ...]:
        kept = self._plain.keep(group, x_TI)
        self._num_plain[group] = len(kept)
        if not self._has(group):
            return kept
        return kept + self._masked.keep(group, self._left(x_TI, self._mask.left_out(group, x_TI.shape[1])))

    def add_grads(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        first, rest = kept[: self._num_plain[group]], kept[self._num_plain[group] :]
        if first:
            self._plain.add_grads(group, x_TI, first, dy_TO, dx_TI)
        if rest:
            left_out_NI, own_TI = self._mask.left_out(group, x_TI.shape[1]), torch.zeros_like(dx_TI)
            self._masked.add_grads(group, self._left(x_TI, left_out_NI), rest, dy_TO, own_TI)
            dx_TI.index_add_(0, self._rows_N, self._mask.apply(left_out_NI, own_TI[self._rows_N]))

    def _has(self, group: str) -> bool:
        return any(group in segment.weights for segment in self._segments)

    def _left(self, x_TI: Tensor, left_out_NI: Tensor) -> Tensor:
        """x with its masks; rows without one hold nothing of use."""
        left_NI = self._mask.apply(left_out_NI, x_TI[self._rows_N])
        return torch.empty_like(x_TI).index_copy_(0, self._rows_N, left_NI)


def masked(segments: Sequence[Segment], backend: LoraBackend) -> LoraPass:
    """The backend's pass, behind masks if some segment has one."""
    if any(segment.mask is not None for segment in segments):
        return MaskedLora(segments, backend)
    return backend(segments)
