"""Adapters as the sampler holds them, and how a decode batch of mixed adapters is computed.

In decode every row is one token of one sequence. Adapters are stacked by their groups and rank classes, and each
stacked adapter serves a tile of up to 16 rows. In deterministic mode a tile has at least 4: batched products give the
same bits for any number of matrices and of rows from 2 up (measured; a single row, and a product of fewer than 400
multiplications, take other kernels), so a row's numbers depend on its own adapter alone. Otherwise tiles of one row are
used, and a batch of one adapter needs no stack. Rows without adapter are not touched.
Shape letters: T rows of the batch, N rows of all tiles, I inputs, O outputs, C columns of a block of layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, count
from weakref import ref

import torch
from torch import Tensor

from tinsmith.lora_options import VISION
from tinsmith.model import RowLayout
from tinsmith.model.lora import ExpertWeights, LoraWeights
from tinsmith.model.lora.segments import add_adapter
from tinsmith.model.vision import Lens
from tinsmith.sampling.stacked import StackedGroup

MIN_TILE = 4
MAX_TILE = 16
MIN_RANK = 8
MAX_STRETCHES = 8  # with more of them, adding row by row is as fast
KEPT_BYTES = 512 << 20  # of slots that no row uses, for adapters that come back
NUMBERS = count()  # of lenses


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """A frozen snapshot. matrices: by group of layers with one input, in the base's dtype; experts: of groups of
    experts; rank: the greatest; shape: equal of adapters whose stacks have the same groups and rank classes; lens: of
    the vision tower."""

    rank: int
    shape: Hashable
    matrices: Mapping[str, LoraWeights]
    experts: Mapping[str, ExpertWeights] = field(default_factory=dict)
    lens: Lens | None = None

    @classmethod
    def of(cls, layout: RowLayout, row_P: Tensor) -> Adapter:
        matrices = layout.views(row_P)
        of_tower = {name: matrices.pop(name) for name in [*matrices] if layout.groups[name][0].linear.group == VISION}
        lens = Lens(of_tower, next(NUMBERS)) if of_tower else None
        return cls.holding(matrices, layout.expert_views(row_P), lens)

    @classmethod
    def holding(
        cls, matrices: Mapping[str, LoraWeights], experts: Mapping[str, ExpertWeights], lens: Lens | None = None
    ) -> Adapter:
        ranks = {name: weights.rank for name, weights in matrices.items()}
        shape = _interned(frozenset((name, rank_class(rank)) for name, rank in ranks.items()))
        return cls(max(ranks.values(), default=0), shape, matrices, experts, lens)

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """y += (x Aᵀ) Bᵀ · scale, in place, if this group has an adapter; all rows belong to this adapter."""
        weights = self.matrices.get(group)
        if weights is not None:
            add_adapter(weights, x_TI, y_TO)


@lru_cache(maxsize=1024)
def _interned(shape: frozenset[tuple[str, int]]) -> frozenset[tuple[str, int]]:
    """One object for equal ones, so that comparing them costs nothing."""
    return shape


def rank_class(rank: int) -> int:
    """The rank padded to a power of two; it is the adapter's own, so padding never depends on neighbours."""
    return max(MIN_RANK, 1 << (rank - 1).bit_length())


def tile_rows(num_rows: int, num_adapters: int, least: int = MIN_TILE) -> int:
    """Rows of a tile: the mean number of rows of an adapter, rounded up to a power of two, within `least`..16."""
    mean = -(-num_rows // num_adapters)
    return min(MAX_TILE, max(least, 1 << (mean - 1).bit_length()))


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


def stretches(targets: Sequence[int], places: Sequence[int]) -> list[tuple[int, int, int]]:
    """Pairs of a row and its place, both counted up together: the first of each, and how many, in the order of rows."""
    found: list[tuple[int, int, int]] = []
    for target, place in sorted(zip(targets, places, strict=True)):
        if found:
            at, start, size = found[-1]
            if target == at + size and place == start + size:
                found[-1] = (at, start, size + 1)
                continue
        found.append((target, place, 1))
    return found


class AdapterStack:
    """Adapters of one shape, stacked, and the rows of the current batch that they serve.

    The adapters of a batch have neighbouring slots, so that no product reads more than it needs. What the others held
    stays, within `KEPT_BYTES`; a change of the batch copies only the adapters that are new in their slot.
    """

    def __init__(self, min_tile: int) -> None:
        self._min_tile = min_tile
        self._held: list[ref[Adapter] | None] = []
        self._is_turned = False
        self._groups: dict[str, StackedGroup] = {}
        self._used: dict[str, StackedGroup] = {}  # the slots of the batch
        self._tile = min_tile
        self._num_rows = 0  # of all tiles, full or not

    @property
    def num_bytes(self) -> int:
        return sum(stack.numel() * stack.element_size() for group in self._groups.values() for stack in group.stacks)

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
            self._held, self._groups, self._is_turned = [], {}, is_turned
        slots = assign_slots([None if held is None else held() for held in self._held], wanted)
        self._load(slots, wanted)
        first, self._num_rows = min(slots), len(wanted) * self._tile
        self._used = {name: group.between(first, first + len(wanted)) for name, group in self._groups.items()}
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
        self._stretches = stretches(targets, places)
        self._gather = torch.tensor(gather, device=device)
        self._places = None if places == every_row else torch.tensor(places, device=device)
        self._targets = torch.tensor(targets, device=device)

    def add(self, name: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """y += the adapters' part, in place, on the rows they serve."""
        group = self._used.get(name)
        if group is None:
            return
        x_NI = x_TI[: self._num_rows] if self._is_plain else x_TI.index_select(0, self._gather)
        parts = group.times(x_NI.view(-1, self._tile, x_NI.shape[1]))
        for block, part_NO in zip(group.blocks, parts, strict=True):
            y_TC = y_TO if len(parts) == 1 else y_TO[:, slice(*block.columns)]
            if len(self._stretches) <= MAX_STRETCHES:
                for target, place, size in self._stretches:
                    y_TC[target : target + size] += part_NO[place : place + size]
                continue
            own_NO = part_NO if self._places is None else part_NO.index_select(0, self._places)
            y_TC.index_add_(0, self._targets, own_NO.to(y_TO.dtype))

    def _load(self, slots: Sequence[int], wanted: Sequence[Adapter]) -> None:
        if len(wanted) > len(self._held):
            self._reserve(wanted[0], len(wanted))
        for slot, adapter in zip(slots, wanted, strict=True):
            held = self._held[slot]
            if held is None or held() is not adapter:
                self._held[slot] = ref(adapter)
                for name, weights in adapter.matrices.items():
                    self._groups[name].fill(slot, weights)

    def _reserve(self, like: Adapter, num_slots: int) -> None:
        """Make room for at least `num_slots`, keeping what is loaded; grows by half, so that growing stays rare."""
        kept = len(self._held)
        capacity = max(num_slots, kept * 3 // 2)
        for name, weights in like.matrices.items():
            made = StackedGroup.like(weights, rank_class(weights.rank), capacity, self._is_turned)
            if kept:
                for stack, old in zip(made.stacks, self._groups[name].stacks, strict=True):
                    stack[:kept] = old
            self._groups[name] = made
        self._held += [None] * (capacity - kept)


class DecodeLora:
    """The LoRA of a decode batch: which stack serves which rows.

    is_exact: a row's bits don't depend on the other rows.
    """

    def __init__(self, device: torch.device, is_exact: bool = True) -> None:
        self._device = device
        self._is_exact = is_exact
        self._sole: tuple[Adapter, int] | None = None  # the adapter of all rows, and their number
        self._stacks: dict[Hashable, AdapterStack] = {}  # those that were used last come last
        self._used: list[AdapterStack] = []

    def arrange(self, adapters_B: Sequence[Adapter | None]) -> None:
        """Take a new batch: the adapter of each row. Rows past the end are padding."""
        sole = adapters_B[0] if adapters_B and len(set(adapters_B)) == 1 and not self._is_exact else None
        self._sole = None if sole is None else (sole, len(adapters_B))
        if sole is not None:
            return
        rows: dict[Hashable, dict[Adapter, list[int]]] = {}
        for row, adapter in enumerate(adapters_B):
            if adapter is not None:
                of_stack = rows.setdefault(adapter.shape, {})
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
