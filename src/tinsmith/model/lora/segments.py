"""The CPU's backend: segment by segment, in place. Nothing is padded, and no product is made of more than it needs.

With many short segments a view or an allocation costs as much as a product. So rows and columns are cut for all
segments at once, and what is computed of them lies in one tensor.
Shape letters: T rows of the pass, N rows of a segment, M rows of all segments of a crowd, or of their live ranges, I
inputs, O outputs of a group and O_l of a layer, R rank, L layers of a group, K = L · R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from tinsmith.model.lora.backend import LoraWeights, Segment

ROW_GRID = 16  # numbers: rows of u begin at multiples of 64 bytes, so that bits don't depend on which rows they are

Range = tuple[int, int]


class _Cut:
    """Ranges of rows, ascending and disjoint, that are cut out of many tensors."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self.end = 0
        self._sizes: list[int] = []
        self._places: list[int] = []
        for start, end in ranges:
            if start > self.end:
                self._sizes.append(start - self.end)
            self._places.append(len(self._sizes))
            self._sizes.append(end - start)
            self.end = end

    def rows(self, tensor: Tensor) -> Sequence[Tensor]:
        return self._of(tensor, 0)

    def columns(self, tensor: Tensor) -> Sequence[Tensor]:
        return self._of(tensor, 1)

    def _of(self, tensor: Tensor, dim: int) -> Sequence[Tensor]:
        """A view for each range."""
        parts = tensor.narrow(dim, 0, self.end).split_with_sizes(self._sizes, dim)
        return parts if len(parts) == len(self._places) else [parts[place] for place in self._places]


@dataclass(slots=True)
class _Live:
    """The live ranges of some segments: the segment of each, and where they are in the pass, in u, and end to end."""

    owners: list[int]
    in_pass: _Cut
    in_u: _Cut
    alone: _Cut


class Rows:
    """Where the rows of some segments are: in the pass, and in u, which holds them end to end."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self.in_pass = _Cut([(segment.start, segment.end) for segment in segments])
        self._ends = list(accumulate(segment.end - segment.start for segment in segments))
        self.in_u = _end_to_end(self._ends)
        self._live: _Live | None = None

    @property
    def live(self) -> _Live:
        if self._live is None:
            found = [(index, span) for index, segment in enumerate(self._segments) for span in segment.live]
            shifts = [end - segment.end for end, segment in zip(self._ends, self._segments, strict=True)]
            in_u = [(start + shifts[index], end + shifts[index]) for index, (start, end) in found]
            alone = _end_to_end(list(accumulate(end - start for _, (start, end) in found)))
            owners, spans = [index for index, _ in found], [span for _, span in found]
            self._live = _Live(owners, _Cut(spans), _Cut(in_u), alone)
        return self._live


def _end_to_end(ends: Sequence[int]) -> _Cut:
    return _Cut(list(zip([0, *ends], ends, strict=False)))


class Crowd(Protocol):
    """Segments whose matrices in a group have the same shapes, and who all have gradients, or none."""

    has_grads: bool

    def shrink(self, x_TI: Tensor) -> Tensor:
        """u = x Aᵀ, [M, K]."""
        ...

    def add(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """y += scale · u Bᵀ, in place. Returns u."""
        ...

    def add_grads(self, x_TI: Tensor, u_MK: Tensor, dy_TO: Tensor, dx_TI: Tensor) -> None:
        """Of the live rows: dB += scale · dyᵀ u and, with g = scale · dy B, dx += g A and dA += gᵀ x, in place."""
        ...


class _TorchCrowd:
    """See `Crowd`."""

    def __init__(self, group: str, segments: Sequence[Segment], rows: Rows) -> None:
        self.has_grads = segments[0].grads is not None
        self._rows = rows
        self._weights = [segment.weights[group] for segment in segments]
        self._grads = [segment.grads[group] for segment in segments if segment.grads is not None]
        self._scales = [weights.scale for weights in self._weights]  # None where layers have different ones
        self._rank, self._widths = self._weights[0].rank, [len(b_OR) for b_OR in self._weights[0].bs]

    def shrink(self, x_TI: Tensor) -> Tensor:
        own = self._rows
        u_MK = self._empty_u(x_TI, own.in_u.end)
        rows = zip(self._weights, own.in_pass.rows(x_TI), own.in_u.rows(u_MK), strict=True)
        for weights, x_NI, u_NK in rows:
            torch.mm(x_NI, weights.a_KI.T, out=u_NK)
        return u_MK

    def add(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        u_MK = self.shrink(x_TI)
        for layer, (u_MR, y_TOl) in enumerate(zip(self._by_layer(u_MK), self._outputs_by_layer(y_TO), strict=True)):
            rows = zip(self._weights, self._rows.in_u.rows(u_MR), self._rows.in_pass.rows(y_TOl), strict=True)
            for weights, u_NR, y_NOl in rows:
                y_NOl.addmm_(u_NR, weights.bs[layer].T, alpha=weights.scales[layer])
        return u_MK

    def add_grads(self, x_TI: Tensor, u_MK: Tensor, dy_TO: Tensor, dx_TI: Tensor) -> None:
        if self._rows.live.owners:
            self._add_input_grads(self._add_output_grads(u_MK, dy_TO), x_TI, dx_TI)

    def _add_output_grads(self, u_MK: Tensor, dy_TO: Tensor) -> Tensor:
        """dB; g of the live rows, [M, K], without the scale where layers have the same."""
        live = self._rows.live
        g_MK = self._empty_u(u_MK, live.alone.end)
        layers = zip(self._by_layer(u_MK), self._by_layer(g_MK), self._outputs_by_layer(dy_TO), strict=True)
        for layer, (u_MR, g_MR, dy_TOl) in enumerate(layers):
            dys, turned = live.in_pass.rows(dy_TOl), live.in_pass.columns(dy_TOl.T)
            rows = zip(live.owners, live.in_u.rows(u_MR), live.alone.rows(g_MR), dys, turned, strict=True)
            for owner, u_NR, g_NR, dy_NOl, dy_OlN in rows:
                weights = self._weights[owner]
                scale = weights.scales[layer]
                torch.mm(dy_NOl, weights.bs[layer], out=g_NR)
                if self._scales[owner] is None:
                    g_NR.mul_(scale)
                self._grads[owner].bs[layer].addmm_(dy_OlN, u_NR, alpha=scale)
        return g_MK

    def _add_input_grads(self, g_MK: Tensor, x_TI: Tensor, dx_TI: Tensor) -> None:
        live = self._rows.live
        rows = zip(
            live.owners, live.alone.rows(g_MK), live.alone.columns(g_MK.T), live.in_pass.rows(x_TI),
            live.in_pass.rows(dx_TI), strict=True,
        )  # fmt: skip
        for owner, g_NK, g_KN, x_NI, dx_NI in rows:
            scale = self._scales[owner]
            left = 1.0 if scale is None else scale
            dx_NI.addmm_(g_NK, self._weights[owner].a_KI, alpha=left)
            self._grads[owner].a_KI.addmm_(g_KN, x_NI, alpha=left)

    def _empty_u(self, like: Tensor, num_rows: int) -> Tensor:
        """[M, K]."""
        num_columns = self._rank * len(self._widths)
        grid = -(-num_columns // ROW_GRID) * ROW_GRID
        u_MK = like.new_empty(num_rows, grid)
        return u_MK if grid == num_columns else u_MK[:, :num_columns]

    def _by_layer(self, u_MK: Tensor) -> Sequence[Tensor]:
        return (u_MK,) if len(self._widths) == 1 else u_MK.split_with_sizes([self._rank] * len(self._widths), 1)

    def _outputs_by_layer(self, y_TO: Tensor) -> Sequence[Tensor]:
        return (y_TO,) if len(self._widths) == 1 else y_TO.split_with_sizes(self._widths, 1)


class SegmentsLora:
    """See `LoraPass`. Segments' `live` ranges are looked at in the first call of `add_grads`."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._crowds: dict[str, list[Crowd]] = {}
        self._rows: dict[tuple[int, ...], Rows] = {}

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for crowd in self._of(group):
            u_MK = crowd.add(x_TI, y_TO)
            if crowd.has_grads:
                kept.append(u_MK)
        return tuple(kept)

    def keep(self, group: str, x_TI: Tensor) -> tuple[Tensor, ...]:
        return tuple(crowd.shrink(x_TI) for crowd in self._of(group) if crowd.has_grads)

    def add_grads(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        crowds = [crowd for crowd in self._of(group) if crowd.has_grads]
        for crowd, u_MK in zip(crowds, kept, strict=True):
            crowd.add_grads(x_TI, u_MK, dy_TO, dx_TI)

    def _of(self, group: str) -> list[Crowd]:
        crowds = self._crowds.get(group)
        if crowds is None:
            alike: dict[tuple[int, bool], list[int]] = {}
            for index, segment in enumerate(self._segments):
                weights = segment.weights.get(group)
                if weights is not None:
                    alike.setdefault((weights.rank, segment.grads is None), []).append(index)
            crowds = self._crowds[group] = [self._crowd(group, tuple(indices)) for indices in alike.values()]
        return crowds

    def _crowd(self, group: str, indices: tuple[int, ...]) -> Crowd:
        segments = [self._segments[index] for index in indices]
        if indices not in self._rows:
            self._rows[indices] = Rows(segments)
        return _TorchCrowd(group, segments, self._rows[indices])


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
    ys = y_NO.split_with_sizes([b_OR.shape[0] for b_OR in weights.bs], 1)
    return zip(ys, weights.bs, u_NK.split_with_sizes([weights.rank] * len(weights.bs), 1), strict=True)
