"""Adapters as the sampler holds them, and how a decode batch of mixed adapters is computed.

In decode every row is one token of one sequence. Adapters are stacked by (targets, rank class) for each group of layers
with one input, so that a group's LoRA is one batched product, and one more for each of its layers, whatever the number
of adapters. Each stacked adapter serves a tile of up to 16 rows. In deterministic mode a tile has at least 4: batched
products give the same bits for any number of matrices and of rows from 2 up (measured; a single row, and a product of
fewer than 400 multiplications, take other kernels), so a row's numbers depend on its own adapter alone. Otherwise tiles
of one row are used, which take half the time, and a batch of one adapter needs no stack. Rows without adapter are not
touched.
Shape letters: T rows, I inputs, O outputs, R rank, L layers of a group, K = L · R or more, S slots of a stack, M rows
of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinsmith.model import RowLayout
from tinsmith.model.lora import LoraWeights
from tinsmith.model.lora.segments import add_adapter
from tinsmith.types import Targets

MIN_TILE = 4
MAX_TILE = 16
MIN_RANK = 8
COLUMN_GRID = 16


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A frozen snapshot. matrices: by group of layers with one input, in the base's dtype; scale: alpha / rank."""

    targets: Targets
    rank: int
    scale: float
    matrices: Mapping[str, LoraWeights]

    @classmethod
    def of(cls, layout: RowLayout, targets: Targets, row_P: Tensor, alpha: float) -> Adapter:
        return cls(targets, layout.rank, alpha / layout.rank, layout.views(row_P))

    @property
    def rank_class(self) -> int:
        """The rank padded to a power of two; it is the adapter's own, so padding never depends on neighbours."""
        return max(MIN_RANK, 1 << (self.rank - 1).bit_length())

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """y += (x Aᵀ) Bᵀ · scale, in place, if this group has an adapter; all rows belong to this adapter."""
        weights = self.matrices.get(group)
        if weights is not None:
            add_adapter(weights, x_TI, y_TO, self.scale)


def tile_rows(num_rows: int, num_adapters: int, least: int = MIN_TILE) -> int:
    """Rows of a tile: the mean number of rows of an adapter, rounded up to a power of two, within `least`..16."""
    mean = -(-num_rows // num_adapters)
    return min(MAX_TILE, max(least, 1 << (mean - 1).bit_length()))


def padded_columns(num_columns: int) -> int:
    """The width of a stacked A. One matrix of 24 columns is split over three threads into kernels of its own."""
    return num_columns if num_columns <= COLUMN_GRID else -(-num_columns // COLUMN_GRID) * COLUMN_GRID


def assign_slots(held: Sequence[Adapter | None], wanted: Sequence[Adapter]) -> list[int]:
    """A slot for each wanted adapter (which may repeat): one that holds it already where there is one, else a free one.

    Free are slots whose adapter isn't wanted there; slots past the end are appended. No slot is given twice.
    """
    slots: dict[int, list[int]] = {}
    for slot, adapter in enumerate(held):
        slots.setdefault(id(adapter), []).append(slot)
    assigned = [slots[id(a)].pop(0) if slots.get(id(a)) else -1 for a in wanted]
    taken = set(assigned)
    free = (slot for slot in range(len(held) + len(wanted)) if slot not in taken)
    return [slot if slot >= 0 else next(free) for slot in assigned]


class AdapterStack:
    """Adapters of one (targets, rank class), stacked, and the rows of the current batch that they serve.

    Slots of adapters that left stay until they are needed or outnumber the used ones; a change of the batch copies
    only the adapters that are new.
    """

    def __init__(self, min_tile: int) -> None:
        self._min_tile = min_tile
        self._held: list[Adapter | None] = []
        self._a_SIK: dict[str, Tensor] = {}
        self._bs: dict[str, list[Tensor]] = {}
        self._num_slots = 0
        self._tile = min_tile

    def arrange(self, rows: Mapping[Adapter, Sequence[int]], device: torch.device) -> None:
        """Take the rows of each adapter of the batch."""
        num_rows = sum(len(of_adapter) for of_adapter in rows.values())
        self._tile = tile_rows(num_rows, len(rows), self._min_tile)
        tiles = [
            (adapter, of_adapter[at : at + self._tile])
            for adapter, of_adapter in rows.items()
            for at in range(0, len(of_adapter), self._tile)
        ]
        wanted = [adapter for adapter, _ in tiles]
        if len(self._held) > 2 * len(wanted):
            self._held, self._a_SIK, self._bs = [], {}, {}
        slots = assign_slots(self._held, wanted)
        self._load(slots, wanted)
        self._num_slots = max(slots) + 1
        gather = [0] * (self._num_slots * self._tile)
        places: list[int] = []
        targets: list[int] = []
        for slot, (_, tile) in zip(slots, tiles, strict=True):
            start = slot * self._tile
            gather[start : start + len(tile)] = tile
            places.extend(range(start, start + len(tile)))
            targets.extend(tile)
        self._gather = torch.tensor(gather, device=device)
        is_dense = places == list(range(len(gather)))
        self._places = None if is_dense else torch.tensor(places, device=device)
        self._targets = torch.tensor(targets, device=device)

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """y += the adapters' part, in place, on the rows they serve."""
        a_SIK = self._a_SIK.get(group)
        if a_SIK is None:
            return
        used, bs = self._num_slots, self._bs[group]
        x_SMI = x_TI.index_select(0, self._gather).view(used, self._tile, -1)
        u_SMK = torch.bmm(x_SMI, a_SIK[:used])
        rank = bs[0].shape[1]
        parts = [torch.bmm(u_SMK[:, :, i * rank : (i + 1) * rank], b_SRO[:used]) for i, b_SRO in enumerate(bs)]
        delta_SMO = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        delta_NO = delta_SMO.view(-1, y_TO.shape[1])
        if self._places is not None:
            delta_NO = delta_NO.index_select(0, self._places)
        y_TO.index_add_(0, self._targets, delta_NO.to(y_TO.dtype))

    def _load(self, slots: Sequence[int], wanted: Sequence[Adapter]) -> None:
        num_slots = max(*slots, len(self._held) - 1) + 1
        if num_slots > len(self._held):
            self._reserve(wanted[0], num_slots)
        for slot, adapter in zip(slots, wanted, strict=True):
            if self._held[slot] is adapter:
                continue
            self._held[slot] = adapter
            for group, weights in adapter.matrices.items():
                a_IK = self._a_SIK[group][slot].zero_()
                as_RI = torch.split(weights.a_KI, adapter.rank)
                for index, (b_SRO, a_RI, b_OR) in enumerate(zip(self._bs[group], as_RI, weights.bs, strict=True)):
                    start = index * adapter.rank_class
                    a_IK[:, start : start + adapter.rank] = a_RI.T
                    torch.mul(b_OR.T, adapter.scale, out=b_SRO[slot][: adapter.rank])
                    b_SRO[slot][adapter.rank :] = 0

    def _reserve(self, like: Adapter, num_slots: int) -> None:
        """Make room for at least `num_slots`, keeping what is loaded; grows by half, so that growing stays rare."""
        capacity = max(num_slots, len(self._held) * 3 // 2)
        kept = len(self._held)

        def grown(stack: Tensor | None, weight: Tensor, *shape: int) -> Tensor:
            made = weight.new_zeros(capacity, *shape)
            if stack is not None:
                made[:kept] = stack
            return made

        width = like.rank_class
        for group, weights in like.matrices.items():
            inputs, layers = weights.a_KI.shape[1], len(weights.bs)
            a_SIK, bs = self._a_SIK.get(group), self._bs.get(group, [None] * layers)
            self._a_SIK[group] = grown(a_SIK, weights.a_KI, inputs, padded_columns(layers * width))
            self._bs[group] = [grown(b, b_OR, width, len(b_OR)) for b, b_OR in zip(bs, weights.bs, strict=True)]
        self._held += [None] * (capacity - kept)


class DecodeLora:
    """The LoRA of a decode batch: which stack serves which rows.

    is_exact: a row's bits don't depend on the other rows.
    """

    def __init__(self, device: torch.device, is_exact: bool = True) -> None:
        self._device = device
        self._is_exact = is_exact
        self._sole: tuple[Adapter, int] | None = None  # the adapter of all rows, and their number
        self._stacks: dict[tuple[Targets, int], AdapterStack] = {}

    def arrange(self, adapters_B: Sequence[Adapter | None]) -> None:
        """Take a new batch: the adapter of each row. Rows past the end are padding."""
        sole = adapters_B[0] if adapters_B and len(set(adapters_B)) == 1 and not self._is_exact else None
        self._sole = None if sole is None else (sole, len(adapters_B))
        if sole is not None:
            return
        rows: dict[tuple[Targets, int], dict[Adapter, list[int]]] = {}
        for row, adapter in enumerate(adapters_B):
            if adapter is not None:
                of_stack = rows.setdefault((adapter.targets, adapter.rank_class), {})
                of_stack.setdefault(adapter, []).append(row)
        self._stacks = {key: self._stacks.get(key) or AdapterStack(MIN_TILE if self._is_exact else 1) for key in rows}
        for key, of_stack in rows.items():
            self._stacks[key].arrange(of_stack, self._device)

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> None:
        if self._sole is not None:
            adapter, num = self._sole
            adapter.add(group, x_TI[:num], y_TO[:num])
            return
        for stack in self._stacks.values():
            stack.add(group, x_TI, y_TO)
