"""The backend of NVIDIA GPUs: all segments of one rank in one launch of each of the kernels of `kernels`.

Adapters are found by address, so runs of any target set share a launch and nothing is copied together; ranks differ
between launches, since they set the kernels' strides. What `add` keeps is u = scale · x Aᵀ of all rows.
Shape letters: T rows of the pass, I inputs, O outputs of a group, R rank, K = layers · R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tinsmith.model.lora import kernels
from tinsmith.model.lora.backend import LoraWeights, Segment
from tinsmith.model.lora.tables import (
    Band,
    Pieces,
    Side,
    Span,
    Tiles,
    addresses,
    bands_of,
    piece_tables,
    tile_table,
    to_device,
)

PIECE_ROWS = 512  # rows whose outer products one program adds up where the order is free


@dataclass(slots=True)
class _Crowd:
    """Segments that share a launch, and their tables; those of the backward pass are made when live rows are known."""

    segments: list[Segment]
    rank: int
    tiles: Tiles
    live_tiles: Tiles | None = None
    pieces: Pieces | None = None
    sides: dict[tuple[str, str], tuple[Side, Side]] = field(default_factory=dict)
    scales: dict[tuple[tuple[float, ...], ...], Tensor] = field(default_factory=dict)


class TritonLora:
    """See `LoraPass`.

    Args:
        is_ordered: add the gradients of a run in the order of its live ranges, each range from its own first row, so
            that their bits don't depend on where a pass is cut. Else ranges are cut and added as they come, which
            fills the GPU where runs are few.
    """

    def __init__(self, segments: Sequence[Segment], *, is_ordered: bool = False) -> None:
        self._segments = segments
        self._is_ordered = is_ordered
        self._crowds: dict[tuple[int, tuple[int, ...]], _Crowd] = {}
        self._of_group: dict[tuple[str, bool], list[_Crowd]] = {}

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for crowd in self._find(group, x_TI.device, wants_grads=False):
            u_TK = _shrunk(crowd, group, x_TI)
            kernels.expand(u_TK, _sides(crowd, group, "weights")[1], crowd.tiles, y_TO)
            if any(segment.grads is not None for segment in crowd.segments):
                kept.append(u_TK)
        return tuple(kept)

    def keep(self, group: str, x_TI: Tensor) -> tuple[Tensor, ...]:
        return tuple(_shrunk(crowd, group, x_TI) for crowd in self._find(group, x_TI.device, wants_grads=True))

    def add_grads(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        for crowd, u_TK in zip(self._find(group, x_TI.device, wants_grads=True), kept, strict=True):
            tiles, pieces = self._live(crowd, x_TI.device)
            near, far = _sides(crowd, group, "weights")
            grad_near, grad_far = _sides(crowd, group, "grads")
            g_TK = torch.empty_like(u_TK)
            kernels.shrink(dy_TO, far, tiles, _scales(crowd, group), g_TK)
            kernels.expand(g_TK, near, tiles, dx_TI)
            kernels.outer(x_TI, g_TK, grad_near, pieces)
            kernels.outer(dy_TO, u_TK, grad_far, pieces)

    def _find(self, group: str, device: torch.device, *, wants_grads: bool) -> list[_Crowd]:
        """The crowds of a group, by rank; with `wants_grads` those alone in which some segment has gradients."""
        found = self._of_group.get((group, wants_grads))
        if found is None:
            by_rank: dict[int, list[int]] = {}
            for index, segment in enumerate(self._segments):
                if group in segment.weights:
                    by_rank.setdefault(segment.weights[group].rank, []).append(index)
            found = [self._crowd(rank, tuple(by_rank[rank]), device) for rank in sorted(by_rank)]
            if wants_grads:
                found = [crowd for crowd in found if any(segment.grads is not None for segment in crowd.segments)]
            self._of_group[group, wants_grads] = found
        return found

    def _crowd(self, rank: int, indices: tuple[int, ...], device: torch.device) -> _Crowd:
        crowd = self._crowds.get((rank, indices))
        if crowd is None:
            segments = [self._segments[index] for index in indices]
            spans = [(index, (segment.start, segment.end)) for index, segment in enumerate(segments)]
            crowd = self._crowds[rank, indices] = _Crowd(segments, rank, _tiles(spans, device))
        return crowd

    def _live(self, crowd: _Crowd, device: torch.device) -> tuple[Tiles, Pieces]:
        if crowd.live_tiles is None or crowd.pieces is None:
            spans = [
                (index, span)
                for index, segment in enumerate(crowd.segments)
                if segment.grads is not None
                for span in segment.live
            ]
            owners = [id(segment.grads) for segment in crowd.segments]
            table, flat, is_sole = piece_tables(spans, owners, None if self._is_ordered else PIECE_ROWS)
            is_sole = is_sole and not any(segment.shares_grads for segment in crowd.segments)
            num = table.shape[1] - 1
            crowd.live_tiles = _tiles(spans, device)
            crowd.pieces = Pieces(num, to_device(table, device), to_device(flat, device), is_sole)
        return crowd.live_tiles, crowd.pieces


def _shrunk(crowd: _Crowd, group: str, x_TI: Tensor) -> Tensor:
    """u = scale · x Aᵀ, [T, K]."""
    near, _ = _sides(crowd, group, "weights")
    u_TK = x_TI.new_empty(len(x_TI), near.num_narrow)
    kernels.shrink(x_TI, near, crowd.tiles, _scales(crowd, group), u_TK)
    return u_TK


def _scales(crowd: _Crowd, group: str) -> Tensor:
    """float32 [S, L], one table for all groups whose scales are the same."""
    scales = tuple(segment.weights[group].scales for segment in crowd.segments)
    if scales not in crowd.scales:
        device = crowd.segments[0].weights[group].a_KI.device
        crowd.scales[scales] = to_device(np.array(scales, np.float32), device)
    return crowd.scales[scales]


def _tiles(spans: Sequence[tuple[int, Span]], device: torch.device) -> Tiles:
    table = tile_table(spans, kernels.BLOCK_ROWS)
    return Tiles(table.shape[1], to_device(table, device))


def _sides(crowd: _Crowd, group: str, part: str) -> tuple[Side, Side]:
    """The As and the Bs of the crowd in a group, or the gradients of them."""
    sides = crowd.sides.get((group, part))
    if sides is None:
        own = _matrices(crowd, group, part)
        inputs, widths = own[0].a_KI.shape[1], [len(b_OR) for b_OR in own[0].bs]
        near = (Band(0, inputs, 0),)
        sides = (
            _side([[w.a_KI] for w in own], near, (1, inputs), len(widths) * crowd.rank),
            _side([list(w.bs) for w in own], bands_of(widths, crowd.rank), (crowd.rank, 1), crowd.rank),
        )
        crowd.sides[group, part] = sides
    return sides


def _matrices(crowd: _Crowd, group: str, part: str) -> list[LoraWeights]:
    """One a segment. Where a segment has no gradients another's stand in: no piece leads there."""
    if part == "weights":
        return [segment.weights[group] for segment in crowd.segments]
    grads = [None if segment.grads is None else segment.grads[group] for segment in crowd.segments]
    stand_in = next(found for found in grads if found is not None)
    return [stand_in if found is None else found for found in grads]


def _side(matrices: list[list[Tensor]], bands: tuple[Band, ...], strides: tuple[int, int], num_narrow: int) -> Side:
    anchor = matrices[0][0]
    at, unit = addresses(matrices, anchor)
    device = anchor.device
    return Side(anchor, to_device(at, device), unit, bands, _band_table(bands, device), strides, num_narrow)


@lru_cache(maxsize=4096)
def _band_table(bands: tuple[Band, ...], device: torch.device) -> Tensor:
    return to_device(np.array([(band.start, band.width, band.narrow) for band in bands], np.int32), device)
