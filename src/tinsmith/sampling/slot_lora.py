"""The LoRA of a decode batch in experts, on a GPU: adapters are read where they lie, slot by slot.

A slot is a row in one of its experts (see `model.routes`; without filler). Its key says both, its row says whose
adapter serves it, and a table says where that adapter's matrices begin; the expert is so many matrices further on. All
of that is looked up on the device. So nothing waits for the routes, and a captured CUDA graph goes on with other routes
and adapters: who is in the batch changes the tables' numbers, never their addresses. The plain reference takes the
slots of one adapter and one expert together.
What stays true: rows of nobody are not touched.
Shape letters: B rows there is room for, N slots, F adapters there is room for, G groups of layers, L layers of a group
at most, E experts, K rows of A of a group, I inputs, O outputs of a group.
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

from tinsmith.model import LinearInfo, Routes
from tinsmith.model.lora import ExpertWeights
from tinsmith.model.lora.segments import add_adapter
from tinsmith.sampling.lora import Adapter

UNIT = 8  # elements, see `tiled_lora.UNIT`
MIN_CLASS = 16
FIRST_ROWS = 256
FIRST_ADAPTERS = 32

Table = NDArray[Any]


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """Layers of experts with one input. index: its table. widths: outputs of each layer, side by side in y. shares_a,
    shares_b: all experts have the same."""

    index: int
    inputs: int
    widths: tuple[int, ...]
    shares_a: bool
    shares_b: bool


@dataclass(frozen=True, slots=True)
class SlotShape:
    """What of a batch decides how kernels are launched; see `tiled_lora.TileShape`. rank_class: 0 if nobody has an
    adapter in experts."""

    rank_class: int
    is_aligned: bool


@dataclass(frozen=True, slots=True)
class SlotTables:
    """anchor: a tensor of the matrices' dtype, from whose first element addresses count. owners_B: int32, the adapter
    of each row, -1 for none. scales_GLF: float32. places_GLF: int64 [G, 2 + L, F]: the rank, 0 where the adapter has no
    matrices in the group; where A of expert 0 begins; where each B of expert 0 begins, in elements or in UNITs."""

    anchor: Tensor
    owners_B: Tensor
    scales_GLF: Tensor
    places_GLF: Tensor

    @classmethod
    def make(cls, num_groups: int, num_layers: int, num_rows: int, num_adapters: int, anchor: Tensor) -> SlotTables:
        device = anchor.device
        return cls(
            anchor=anchor,
            owners_B=torch.full((num_rows,), -1, dtype=torch.int32, device=device),
            scales_GLF=torch.zeros(num_groups, num_layers, num_adapters, dtype=torch.float32, device=device),
            places_GLF=torch.zeros(num_groups, 2 + num_layers, num_adapters, dtype=torch.int64, device=device),
        )

    @property
    def num_rows(self) -> int:
        return len(self.owners_B)

    @property
    def num_adapters(self) -> int:
        return self.places_GLF.shape[2]

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in (self.anchor, self.owners_B, self.scales_GLF, self.places_GLF))


class SlotLora:
    """Of all layers of experts of a model. `arrange` takes a new batch, `of` gives one layer's part in one walk."""

    def __init__(self, linears: Iterable[LinearInfo], anchor: Tensor) -> None:
        """anchor: of the adapters' dtype, on their device."""
        by_lead: dict[str, list[LinearInfo]] = {}
        for linear in linears:
            if linear.is_of_experts:
                by_lead.setdefault(linear.lead, []).append(linear)
        self._groups = {
            lead: SlotGroup(
                index, own[0].in_features, tuple(o.out_features for o in own), own[0].num_a == 1, own[0].num_b == 1
            )
            for index, (lead, own) in enumerate(by_lead.items())
        }
        self._is_even = not any(
            n % UNIT for group in self._groups.values() for n in (group.inputs, *group.widths)
        )  # an expert's matrix begins as evenly as the first one's
        self._num_layers = max((len(group.widths) for group in self._groups.values()), default=0)
        self._adapters: list[Adapter] = []
        self._owners: Table = np.zeros(0, np.int32)
        self._places: dict[Adapter, tuple[Table, Table]] = {}
        self.tables = SlotTables.make(len(self._groups), self._num_layers, FIRST_ROWS, FIRST_ADAPTERS, anchor)
        self.shape = SlotShape(0, is_aligned=True)

    def arrange(self, adapters_B: Sequence[Adapter | None]) -> None:
        """Take a new batch: the adapter of each row. Rows past the end are padding."""
        numbers: dict[Adapter, int] = {}
        self._owners = np.full(len(adapters_B), -1, np.int32)
        for row, adapter in enumerate(adapters_B):
            if adapter is not None and adapter.experts:
                self._owners[row] = numbers.setdefault(adapter, len(numbers))
        self._adapters = list(numbers)
        self._places = {a: self._places[a] if a in self._places else self._place(a) for a in numbers}
        tables = self.tables
        if len(adapters_B) > tables.num_rows or len(numbers) > tables.num_adapters:
            room = max(2 * len(adapters_B), tables.num_rows), max(2 * len(numbers), tables.num_adapters)
            self.tables = SlotTables.make(len(self._groups), self._num_layers, *room, tables.anchor)
        self.shape = self._shape()
        self._write()

    def of(self, routes: Routes) -> SlotAdapters:
        return SlotAdapters(self, routes)

    def group(self, name: str) -> SlotGroup:
        return self._groups[name]

    def add(self, name: str, routes: Routes, x_NI: Tensor, y_NO: Tensor) -> None:
        """y += the adapters' part, in place. Without filler among the slots."""
        if not self.shape.rank_class:
            return
        if x_NI.device.type == "cuda":
            kernel = importlib.import_module("tinsmith.sampling.slot_kernel").add_slots
            kernel(self.tables, self._groups[name], self.shape, routes, x_NI, y_NO)
        else:
            add_slots_plainly(self._adapters, self._owners, name, routes, x_NI, y_NO)

    def _place(self, adapter: Adapter) -> tuple[Table, Table]:
        """What the tables say of an adapter: places, int64 [G, 2 + L], and scales, float32 [G, L]."""
        anchor = self.tables.anchor
        place = np.zeros((len(self._groups), 2 + self._num_layers), np.int64)
        scales = np.zeros((len(self._groups), self._num_layers), np.float32)
        for name, weights in adapter.experts.items():
            index = self._groups[name].index
            place[index, 0] = rank_of(weights)
            scales[index, : len(weights.scales)] = weights.scales
            for number, matrix in enumerate(weights.tensors):
                offset = matrix.data_ptr() - anchor.data_ptr()
                assert offset % anchor.element_size() == 0, "adapters have the base's dtype"
                place[index, 1 + number] = offset // anchor.element_size()
        return place, scales

    def _shape(self) -> SlotShape:
        ranks = [rank_of(weights) for adapter in self._adapters for weights in adapter.experts.values()]
        if not ranks:
            return SlotShape(0, is_aligned=True)
        is_aligned = self._is_even and not any((place % UNIT).any() for place, _ in self._places.values())
        return SlotShape(max(MIN_CLASS, 1 << (max(ranks) - 1).bit_length()), is_aligned)

    def _write(self) -> None:
        """Where they are aligned addresses are counted in UNITs; ranks never are."""
        tables, num = self.tables, len(self._adapters)
        owners = np.full(tables.num_rows, -1, np.int32)
        owners[: len(self._owners)] = self._owners
        tables.owners_B.copy_(torch.from_numpy(owners))
        if not num:
            return
        places_GLF, scales_GLF = (np.stack([self._places[a][part] for a in self._adapters], -1) for part in (0, 1))
        if self.shape.is_aligned:
            places_GLF[:, 1:] //= UNIT
        tables.places_GLF[..., :num].copy_(torch.from_numpy(places_GLF))
        tables.scales_GLF[..., :num].copy_(torch.from_numpy(scales_GLF))


class SlotAdapters:
    """See `model.ExpertAdapters`: of one layer in one walk, without gradients."""

    def __init__(self, lora: SlotLora, routes: Routes) -> None:
        self._lora = lora
        self._routes = routes

    def add(self, group: str, x_NI: Tensor, y_NO: Tensor) -> tuple[Tensor, ...]:
        self._lora.add(group, self._routes, x_NI, y_NO)
        return ()

    def add_grads(self, group: str, x_NI: Tensor, kept: tuple[Tensor, ...], dy_NO: Tensor, dx_NI: Tensor) -> None:
        raise AssertionError("decoding has no gradients")


def rank_of(weights: ExpertWeights) -> int:
    return weights.bs[0].shape[2]


def add_slots_plainly(
    adapters: Sequence[Adapter], owners_B: Table, group: str, routes: Routes, x_NI: Tensor, y_NO: Tensor
) -> None:
    """The reference: by adapter and expert, with the adapter's own products."""
    experts_N, rows_N = np.divmod(routes.keys_P.cpu().numpy(), len(routes.experts_TK))
    owners_N = np.full(len(rows_N), -1)
    is_known = rows_N < len(owners_B)
    owners_N[is_known] = owners_B[rows_N[is_known]]
    for owner, expert in sorted({*zip(owners_N.tolist(), experts_N.tolist(), strict=True)}):
        weights = adapters[owner].experts.get(group) if owner >= 0 else None
        if weights is None:
            continue
        slots = np.flatnonzero((owners_N == owner) & (experts_N == expert))
        own_MO = y_NO[slots]
        add_adapter(weights.of(expert), x_NI[slots], own_MO)
        y_NO[slots] = own_MO


def slot_lora_for(linears: Sequence[LinearInfo], anchor: Tensor) -> SlotLora | None:
    """None for a model without experts."""
    return SlotLora(linears, anchor) if any(linear.is_of_experts for linear in linears) else None
