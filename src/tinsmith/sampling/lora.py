"""Adapters as the sampler holds them, and how a decode batch of mixed adapters is computed.

In decode every row is one token of one sequence, and what an adapter costs is its reading from memory. Adapters are
stacked by (targets, rank class) for each group of layers with one input, so that a group's LoRA is one batched product,
and one more for each of its layers, whatever the number of adapters. Each stacked adapter serves a tile of up to 16
rows. In deterministic mode a tile has at least 4: batched products give the same bits for any number of matrices and of
rows from 2 up (measured; a single row, and a product of fewer than 400 multiplications, take other kernels), so a row's
numbers depend on its own adapter alone. Otherwise tiles of one row are used, and a batch of one adapter needs no stack.
Rows without adapter are not touched.

How matrices lie, and which operand goes first, decides between kernels that differ by a factor of two to six at one
row (dev/LOG.md, "adapters at the speed of memory"). For tiles of one or two rows they lie as they were trained, A
[K, I] and B [O, R]; u is A x with x as a column, and the rest u Bᵀ. From 4 rows up they lie turned, [I, K] and [R, O].
Shape letters: T rows, I inputs, O outputs, R rank, L layers of a group, K = L · R or more, S slots of a stack, M rows
of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import ref

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
KEPT_BYTES = 256 << 20  # of slots that no row uses, for adapters that come back


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
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
    """The rows of a stacked A. A product of 24 columns is split over three threads into kernels of its own."""
    return num_columns if num_columns <= COLUMN_GRID else -(-num_columns // COLUMN_GRID) * COLUMN_GRID


def assign_slots(held: Sequence[Adapter | None], wanted: Sequence[Adapter]) -> list[int]:
    """A slot for each wanted adapter (which may repeat), together a range without gaps: where most are held already.

    Who is held there keeps a slot, the others take those that are left. No slot is given twice.
    """
    num, ids = len(wanted), {id(adapter) for adapter in wanted}
    is_wanted = [id(adapter) in ids for adapter in held]
    hits = list(accumulate(is_wanted, initial=0))
    starts = range(max(0, len(held) - num) + 1)
    first = max(starts, key=lambda start: hits[min(start + num, len(held))] - hits[start])
    slots: dict[int, list[int]] = {}
    for slot, adapter in enumerate(held[first : first + num], first):
        slots.setdefault(id(adapter), []).append(slot)
    assigned = [slots[id(a)].pop(0) if slots.get(id(a)) else -1 for a in wanted]
    taken = set(assigned)
    free = (slot for slot in range(first, first + num) if slot not in taken)
    return [slot if slot >= 0 else next(free) for slot in assigned]


class AdapterStack:
    """Adapters of one (targets, rank class), stacked, and the rows of the current batch that they serve.

    The adapters of a batch have neighbouring slots, so that no product reads more than it needs. What the others held
    stays, within `KEPT_BYTES`; a change of the batch copies only the adapters that are new in their slot.
    """

    def __init__(self, min_tile: int) -> None:
        self._min_tile = min_tile
        self._held: list[ref[Adapter] | None] = []
        self._is_turned = False  # the matrices are A [I, K] and B [R, O]
        self._matrices: dict[str, tuple[Tensor, ...]] = {}  # of each group A and the Bs, of all slots
        self._used: dict[str, tuple[Tensor, ...]] = {}  # those of the batch, turned whether they lie so or not
        self._tile = min_tile
        self._num_rows = 0  # of all tiles, full or not

    @property
    def num_bytes(self) -> int:
        return sum(stack.numel() * stack.element_size() for stacks in self._matrices.values() for stack in stacks)

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
        is_turned = self._tile >= (2 if self._is_turned else MIN_TILE)
        if is_turned != self._is_turned or (len(self._held) > 2 * len(wanted) and self.num_bytes > KEPT_BYTES):
            self._held, self._matrices, self._is_turned = [], {}, is_turned
        slots = assign_slots([None if held is None else held() for held in self._held], wanted)
        self._load(slots, wanted)
        first, self._num_rows = min(slots), len(wanted) * self._tile
        used = slice(first, first + len(wanted))
        self._used = {
            group: tuple(stack[used] if is_turned else stack[used].mT for stack in stacks)
            for group, stacks in self._matrices.items()
        }
        gather = [0] * self._num_rows
        places: list[int] = []
        targets: list[int] = []
        for slot, (_, tile) in zip(slots, tiles, strict=True):
            start = (slot - first) * self._tile
            gather[start : start + len(tile)] = tile
            places.extend(range(start, start + len(tile)))
            targets.extend(tile)
        every_row = list(range(self._num_rows))
        self._is_plain = places == targets == every_row
        self._gather = torch.tensor(gather, device=device)
        self._places = None if places == every_row else torch.tensor(places, device=device)
        self._targets = torch.tensor(targets, device=device)

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """y += the adapters' part, in place, on the rows they serve."""
        if group not in self._used:
            return
        a_SIK, *bs = self._used[group]
        x_NI = x_TI[: self._num_rows] if self._is_plain else x_TI.index_select(0, self._gather)
        x_SMI = x_NI.view(len(a_SIK), self._tile, -1)
        if self._is_turned:
            u_SMK = torch.bmm(x_SMI, a_SIK)
        else:
            u_SKM = torch.bmm(a_SIK.mT, x_SMI.mT)
            u_SMK = u_SKM.view(len(u_SKM), 1, -1) if self._tile == 1 else u_SKM.mT
        us = torch.split(u_SMK, bs[0].shape[1], -1)
        parts = [torch.bmm(u_SMR, b_SRO).flatten(0, 1) for u_SMR, b_SRO in zip(us, bs, strict=False)]
        if self._is_plain:
            ys = torch.split(y_TO[: self._num_rows], [part_NO.shape[1] for part_NO in parts], 1)
            for y_NO, part_NO in zip(ys, parts, strict=True):
                y_NO += part_NO
            return
        delta_NO = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self._places is not None:
            delta_NO = delta_NO.index_select(0, self._places)
        y_TO.index_add_(0, self._targets, delta_NO.to(y_TO.dtype))

    def _load(self, slots: Sequence[int], wanted: Sequence[Adapter]) -> None:
        if len(wanted) > len(self._held):
            self._reserve(wanted[0], len(wanted))
        for slot, adapter in zip(slots, wanted, strict=True):
            held = self._held[slot]
            if held is None or held() is not adapter:
                self._held[slot] = ref(adapter)
                for group, weights in adapter.matrices.items():
                    own = [stack[slot].T if self._is_turned else stack[slot] for stack in self._matrices[group]]
                    _fill(own, weights, adapter)

    def _reserve(self, like: Adapter, num_slots: int) -> None:
        """Make room for at least `num_slots`, keeping what is loaded; grows by half, so that growing stays rare."""
        kept = len(self._held)
        capacity = max(num_slots, kept * 3 // 2)
        width = like.rank_class
        for group, weights in like.matrices.items():
            shapes = [(padded_columns(len(weights.bs) * width), weights.a_KI.shape[1])]
            shapes += [(len(b_OR), width) for b_OR in weights.bs]
            made = [weights.a_KI.new_zeros(capacity, *(s[::-1] if self._is_turned else s)) for s in shapes]
            for stack, old in zip(made, self._matrices.get(group, ()), strict=False):
                stack[:kept] = old
            self._matrices[group] = tuple(made)
        self._held += [None] * (capacity - kept)


def _fill(own: Sequence[Tensor], weights: LoraWeights, adapter: Adapter) -> None:
    """own: A [K, I] and the Bs [O, R] of one slot, views of whatever stride, whose ranks are the rank class."""
    a_KI, *bs = own
    rank, width = adapter.rank, adapter.rank_class
    if rank < width:
        a_KI.zero_()
    for index, (b_OR, from_RI, from_OR) in enumerate(zip(bs, torch.split(weights.a_KI, rank), weights.bs, strict=True)):
        a_KI[index * width : index * width + rank] = from_RI
        torch.mul(from_OR, adapter.scale, out=b_OR[:, :rank])
        b_OR[:, rank:] = 0


class DecodeLora:
    """The LoRA of a decode batch: which stack serves which rows.

    is_exact: a row's bits don't depend on the other rows.
    """

    def __init__(self, device: torch.device, is_exact: bool = True) -> None:
        self._device = device
        self._is_exact = is_exact
        self._sole: tuple[Adapter, int] | None = None  # the adapter of all rows, and their number
        self._stacks: dict[tuple[Targets, int], AdapterStack] = {}  # those that were used last come last
        self._used: list[AdapterStack] = []

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
        self._used = []
        for key, of_stack in rows.items():
            stack = self._stacks.pop(key, None) or AdapterStack(MIN_TILE if self._is_exact else 1)
            stack.arrange(of_stack, self._device)
            self._stacks[key] = stack
            self._used.append(stack)
        idle = list(self._stacks)[: len(self._stacks) - len(rows)]  # the longest unused first
        while idle and sum(stack.num_bytes for stack in self._stacks.values()) > KEPT_BYTES:
            del self._stacks[idle.pop(0)]

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> None:
        if self._sole is not None:
            adapter, num = self._sole
            adapter.add(group, x_TI[:num], y_TO[:num])
            return
        for stack in self._used:
            stack.add(group, x_TI, y_TO)
