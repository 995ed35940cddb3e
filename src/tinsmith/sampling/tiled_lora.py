"""The LoRA of a decode batch on a GPU: adapters are read where they lie, by tables whose place and shape stay.

Rows of one adapter are gathered in tiles of up to 16. For each group of layers with one input a table says where each
tile's adapter has its matrices; who is in the batch changes the tables' numbers, never their addresses, so a captured
CUDA graph goes on with other adapters. The plain reference takes the tiles one by one.
What stays true: every row with an adapter is in exactly one tile; rows in none are not touched.
Shape letters: B rows of the batch, T tiles there is room for, M rows of a tile, G groups of layers, L layers of a
group at most, I inputs, O outputs of a group.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinsmith.lora_options import VISION
from tinsmith.model import ExpertAdapters, LinearInfo, Routes
from tinsmith.sampling.lora import Adapter
from tinsmith.sampling.slot_lora import SlotShape, slot_lora_for

TILE_ROWS = 16
MIN_CLASS = 16
UNIT = 8  # elements; addresses are counted in it, and ranks are its multiples, where vectors can be loaded
FIRST_CAPACITY = 256  # tiles

Table = NDArray[Any]


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Layers with one input. index: its table. widths: outputs of each layer, side by side in y."""

    index: int
    inputs: int
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TileShape:
    """What of a batch decides how kernels are launched. rank_class: a power of two that no rank exceeds, 0 if nobody
    has an adapter. is_aligned: matrices begin at multiples of UNIT, ranks and the layers' widths are such."""

    rank_class: int
    is_aligned: bool


@dataclass(frozen=True, slots=True)
class TileTables:
    """anchor: a tensor of the matrices' dtype, from whose first element addresses count. rows_TM: int32, -1 for none.
    count: int32 [1], tiles in use. scales_GLT: float32 [G, L, T]. places_GLT: int64 [G, 2 + L, T]: the rank,
    0 where the adapter has no matrices in the group; where A begins; where each B begins, in elements."""

    anchor: Tensor
    rows_TM: Tensor
    count: Tensor
    scales_GLT: Tensor
    places_GLT: Tensor

    @classmethod
    def make(cls, num_groups: int, num_layers: int, capacity: int, anchor: Tensor) -> TileTables:
        device = anchor.device
        return cls(
            anchor=anchor,
            rows_TM=torch.full((capacity, TILE_ROWS), -1, dtype=torch.int32, device=device),
            count=torch.zeros(1, dtype=torch.int32, device=device),
            scales_GLT=torch.zeros(num_groups, num_layers, capacity, dtype=torch.float32, device=device),
            places_GLT=torch.zeros(num_groups, 2 + num_layers, capacity, dtype=torch.int64, device=device),
        )

    @property
    def capacity(self) -> int:
        return len(self.rows_TM)

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in (self.anchor, self.rows_TM, self.count, self.scales_GLT, self.places_GLT))


class TiledLora:
    """See `row_lora.RowLora`. slots: the same of experts, which are no part of `add`."""

    def __init__(self, linears: Sequence[LinearInfo], device: torch.device, dtype: torch.dtype) -> None:
        self._groups = groups_of(linears)
        self._is_even = not any(width % UNIT for group in self._groups.values() for width in group.widths)
        self._num_layers = max(len(group.widths) for group in self._groups.values())
        self._tiles: list[tuple[Adapter, list[int]]] = []
        self._places: dict[Adapter, tuple[Table, Table]] = {}
        anchor = torch.zeros(UNIT, dtype=dtype, device=device)
        self.tables = TileTables.make(len(self._groups), self._num_layers, FIRST_CAPACITY, anchor)
        self.shape = TileShape(0, is_aligned=True)
        self.slots = slot_lora_for(linears, anchor)

    @property
    def key(self) -> tuple[TileShape, SlotShape | None]:
        """What of a batch decides how kernels are launched."""
        return self.shape, None if self.slots is None else self.slots.shape

    @property
    def addresses(self) -> tuple[int, ...]:
        return (*self.tables.addresses, *(() if self.slots is None else self.slots.tables.addresses))

    def experts(self, routes: Routes) -> ExpertAdapters:
        """One layer's part in one walk without filler among the slots."""
        assert self.slots is not None, "made for a model with experts"
        return self.slots.of(routes)

    def arrange(self, adapters_B: Sequence[Adapter | None]) -> None:
        if self.slots is not None:
            self.slots.arrange(adapters_B)
        self._tiles = tiles_of(adapters_B)
        held = {adapter for adapter, _ in self._tiles}
        self._places = {a: self._places[a] if a in self._places else self._place(a) for a in held}
        if len(self._tiles) > self.tables.capacity:
            capacity = 2 * len(self._tiles)
            self.tables = TileTables.make(len(self._groups), self._num_layers, capacity, self.tables.anchor)
        self.shape = self._shape_of(held)
        self._write()

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> None:
        if not self.shape.rank_class:
            return
        if x_TI.device.type == "cuda":
            kernel = importlib.import_module("tinsmith.sampling.tiled_kernel").add_tiles
            kernel(self.tables, self._groups[group], self.shape, x_TI, y_TO)
        else:
            add_tiles_plainly(self._tiles, group, x_TI, y_TO)

    def group(self, name: str) -> TileGroup:
        return self._groups[name]

    def _place(self, adapter: Adapter) -> tuple[Table, Table]:
        """What the tables say of an adapter: places, int64 [G, 2 + L], and scales, float32 [G, L]."""
        anchor = self.tables.anchor
        place = np.zeros((len(self._groups), 2 + self._num_layers), np.int64)
        scales = np.zeros((len(self._groups), self._num_layers), np.float32)
        for name, weights in adapter.matrices.items():
            of_group = place[self._groups[name].index]
            of_group[0] = weights.rank
            scales[self._groups[name].index, : len(weights.scales)] = weights.scales
            for number, matrix in enumerate(weights.tensors):
                offset = matrix.data_ptr() - anchor.data_ptr()
                assert offset % anchor.element_size() == 0, "adapters have the base's dtype"
                of_group[1 + number] = offset // anchor.element_size()
        return place, scales

    def _shape_of(self, held: Iterable[Adapter]) -> TileShape:
        ranks = [adapter.rank for adapter in held]
        if not ranks:
            return TileShape(0, is_aligned=True)
        is_aligned = self._is_even and not any((place % UNIT).any() for place, _ in self._places.values())
        return TileShape(max(MIN_CLASS, 1 << (max(ranks) - 1).bit_length()), is_aligned)

    def _write(self) -> None:
        """Where they are aligned addresses are counted in UNITs; ranks never are."""
        tables, num = self.tables, len(self._tiles)
        tables.count.fill_(num)
        if not num:
            return
        rows_TM = np.full((num, TILE_ROWS), -1, np.int32)
        for tile, (_, rows) in enumerate(self._tiles):
            rows_TM[tile, : len(rows)] = rows
        places_GLT, scales_GLT = (
            np.stack([self._places[adapter][part] for adapter, _ in self._tiles], -1) for part in (0, 1)
        )
        if self.shape.is_aligned:
            places_GLT[:, 1:] //= UNIT
        tables.rows_TM[:num].copy_(torch.from_numpy(rows_TM))
        tables.scales_GLT[..., :num].copy_(torch.from_numpy(scales_GLT))
        tables.places_GLT[..., :num].copy_(torch.from_numpy(places_GLT))


def groups_of(linears: Iterable[LinearInfo]) -> dict[str, TileGroup]:
    """By the name of their first layer, numbered in the model's order; without experts and the vision tower."""
    by_lead: dict[str, list[LinearInfo]] = {}
    for linear in linears:
        if not linear.is_of_experts and linear.group != VISION:
            by_lead.setdefault(linear.lead, []).append(linear)
    return {
        lead: TileGroup(index, own[0].in_features, tuple(linear.out_features for linear in own))
        for index, (lead, own) in enumerate(by_lead.items())
    }


def tiles_of(adapters_B: Sequence[Adapter | None]) -> list[tuple[Adapter, list[int]]]:
    """Each adapter's rows in their order, in tiles."""
    rows: dict[Adapter, list[int]] = {}
    for row, adapter in enumerate(adapters_B):
        if adapter is not None:
            rows.setdefault(adapter, []).append(row)
    return [
        (adapter, own[at : at + TILE_ROWS]) for adapter, own in rows.items() for at in range(0, len(own), TILE_ROWS)
    ]


def add_tiles_plainly(tiles: Iterable[tuple[Adapter, list[int]]], group: str, x_TI: Tensor, y_TO: Tensor) -> None:
    """The reference: tile after tile, with the adapter's own products."""
    for adapter, rows in tiles:
        own_NO = y_TO[rows]
        adapter.add(group, x_TI[rows], own_NO)
        y_TO[rows] = own_NO
