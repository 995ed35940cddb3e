"""The tables by which the Triton kernels find rows, columns and matrices: pure functions of spans, and addresses.

Shape letters: S segments, L bands of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNIT = 16  # elements; the kernels load vectors where matrices begin and bands lie at multiples of it

Table = NDArray[Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Band:
    """Columns start.. of the wide matrix (x or y), as many as `width`, belong to columns narrow.. of the narrow one."""

    start: int
    width: int
    narrow: int


@dataclass(frozen=True, slots=True)
class Side:
    """One matrix W of each band in each segment, with the element (wide column w, narrow column n) at w·sw + n·sn.

    anchor: a tensor of the matrices' dtype. at_SL: int64, where they begin, in elements from the anchor's first one, or
    in UNITs where `unit` says so. num_narrow: narrow columns of a band.
    """

    anchor: Tensor
    at_SL: Tensor
    unit: int
    bands: tuple[Band, ...]
    bands_L: Tensor
    strides: tuple[int, int]
    num_narrow: int

    @property
    def is_aligned(self) -> bool:
        """Vectors of 16 bytes can be loaded everywhere, in bfloat16 as in float32."""
        wide = [number for band in self.bands for number in (band.start, band.width)]
        return self.unit == UNIT and not any(n % UNIT for n in wide) and not any(b.narrow % 8 for b in self.bands)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Blocks of rows of one segment each. table: int32 [3, number]: segment, first row, end of the segment."""

    num: int
    table: Tensor


@dataclass(frozen=True, slots=True)
class Pieces:
    """Spans of rows whose outer products one program adds up, in order.

    table: int32 [2, number + 1]: a piece's first span, its segment. spans: int32 [2, number of spans]: first row, end.
    is_sole: no two pieces add to the same gradient.
    """

    num: int
    table: Tensor
    spans: Tensor
    is_sole: bool


def bands_of(widths: Sequence[int], num_narrow: int) -> tuple[Band, ...]:
    """Bands side by side."""
    starts = np.cumsum([0, *widths])
    return tuple(Band(int(starts[i]), width, i * num_narrow) for i, width in enumerate(widths))


def column_blocks(bands: Sequence[Band], block: int) -> Table:
    """int32 [2, number]: band and first column within it, for each block of columns."""
    cut = [(index, first) for index, band in enumerate(bands) for first in range(0, band.width, block)]
    return np.array(cut, np.int32).reshape(-1, 2).T.copy()


def tile_table(spans: Sequence[tuple[int, Span]], block: int) -> Table:
    """int32 [3, number]: what `Tiles` holds, for spans of rows given with their segment."""
    cut = [(segment, row, end) for segment, (start, end) in spans for row in range(start, end, block)]
    return np.array(cut, np.int32).reshape(-1, 3).T.copy()


def piece_tables(
    spans: Sequence[tuple[int, Span]], owners: Sequence[int], max_rows: int | None
) -> tuple[Table, Table, bool]:
    """What `Pieces` holds: its table, its spans, and whether they are sole.

    Args:
        spans: of rows, with their segment, in the order in which gradients are to be added.
        owners: of each segment, a number that those share who add to the same gradient.
        max_rows: None: one piece an owner, its spans as they are. Else each span is cut into pieces of that many rows.
    """
    groups: list[tuple[int, list[Span]]] = []
    if max_rows is None:
        by_owner: dict[int, tuple[int, list[Span]]] = {}
        for segment, span in spans:
            by_owner.setdefault(owners[segment], (segment, []))[1].append(span)
        groups = list(by_owner.values())
    else:
        for segment, (start, end) in spans:
            groups += [(segment, [(row, min(row + max_rows, end))]) for row in range(start, end, max_rows)]
    firsts = np.cumsum([0, *(len(own) for _, own in groups)])
    table = np.array([firsts, [*(segment for segment, _ in groups), 0]], np.int32)
    flat = np.array([span for _, own in groups for span in own], np.int32).reshape(-1, 2).T.copy()
    return table, flat, len({owners[segment] for segment, _ in groups}) == len(groups)


def addresses(matrices: Sequence[Sequence[Tensor]], anchor: Tensor) -> tuple[Table, int]:
    """Where each matrix begins, counted from the anchor: int64 [S, L], and the unit in which it is counted."""
    size, origin = anchor.element_size(), anchor.data_ptr()
    at = np.array([[matrix.data_ptr() for matrix in of_segment] for of_segment in matrices], np.int64) - origin
    assert not (at % size).any(), "matrices of one side have one dtype"
    at //= size
    unit = UNIT if origin % (UNIT * size) == 0 and not (at % UNIT).any() else 1
    return at // unit, unit


def to_device(table: Table, device: torch.device) -> Tensor:
    """Without waiting for the device, where it is one to wait for."""
    host = torch.from_numpy(table)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@lru_cache(maxsize=256)
def output_blocks(widths: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, int]:
    """int32 [4, number]: layer, first column in it, its width, where it begins in y; for each `block` columns of
    layers of these widths, side by side in y. And how many there are."""
    bands = bands_of(widths, 1)
    layers, firsts = column_blocks(bands, block)
    starts = [bands[layer].start for layer in layers]
    table = np.array([layers, firsts, [widths[layer] for layer in layers], starts], np.int32)
    return to_device(table, device), table.shape[1]
