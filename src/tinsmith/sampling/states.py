"""The states of layers that keep no keys and values: of prompts while they are computed, and of sequences.

A state can't be cut at a position as keys and values can; it is there for the end of what was computed, and for few
positions before that were chosen ahead. What stays true: a row that is computed a second time changes no state, since
each state knows how many rows it has; a prompt's states move on together, after a walk that was computed to its end.
Shape letters: L layers, S slots, N sequences, C channels, K rows before the convolution, H value heads, D key size, E
value size.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tinsmith.model.delta import CHUNK, DeltaKind, LayerState, StateShape, step

Owner = TypeVar("Owner", bound=Hashable)
States = Mapping[int, LayerState]  # of one sequence at one position, by layer
Shapes = Mapping[int, StateShape]


class PromptStates:
    """layers: what there is at `position`, by layer. Without shapes there are none, and nothing here does anything.

    grid: positions at whose multiples states are kept, while `kept` is asked for them; 0 for nowhere. stride: every
    how many of these, and the last before the end of what is computed at once.
    """

    def __init__(self, shapes: Shapes, device: torch.device, grid: int = 0, stride: int = 1) -> None:
        self.layers: dict[int, LayerState] = {layer: empty_state(shape, device) for layer, shape in shapes.items()}
        self.position = 0
        self._grid = grid
        self._stride = grid * stride
        self._next: dict[int, LayerState] = {}
        self._kept: dict[int, dict[int, LayerState]] = {}

    def wanted(self, start: int, end: int) -> list[int]:
        """Positions between these at which states are kept: those at which a chunk of the computation begins."""
        if not self._grid:
            return []
        last = (end - 1) // self._grid * self._grid
        found = {*range(start // self._stride * self._stride, end, self._stride), last}
        return sorted(at for at in found if start < at < end and at % CHUNK == 0)

    def put(self, layer: int, state: LayerState, kept: Mapping[int, LayerState]) -> None:
        """What the walk that is under way came to. It may come again."""
        self._next[layer] = state
        for position, one in kept.items():
            self._kept.setdefault(position, {})[layer] = one

    def advance(self, position: int) -> None:
        """The walk was computed to its end. What is kept is of this walk alone from now on."""
        self.layers.update(self._next)
        self._next = {}
        self._kept = {at: states for at, states in self._kept.items() if at > self.position}
        self.position = position

    def at(self, position: int) -> States | None:
        """The states at this position, if they are there."""
        if not self.layers:
            return None
        return dict(self.layers) if position == self.position else self._kept.get(position)

    def load(self, position: int, states: States) -> None:
        self.layers = dict(states)
        self.position = position


class SequenceStates(Generic[Owner]):
    """All sequences' states, in slots that lie side by side: a decode step works on them where they are."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self._shapes = shapes
        self._device = device
        self._owners: list[Owner] = []
        self._row_of_slot_N = torch.empty(0, dtype=torch.int64, device=device)
        self._positions_N = self._row_of_slot_N
        self.num_slots = 0
        self._layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._resize(0)

    def place(self, owner: Owner, prompt: PromptStates) -> None:
        """A new sequence, that begins where the prompt ends."""
        slot = len(self._owners)
        if slot == self.num_slots:
            self._resize(slot + max(1, slot // 4))
        position = prompt.position
        for layer, (rows_SKC, state_SHDE, counts_S) in self._layers.items():
            rows_SKC[slot] = prompt.layers[layer].rows_KC
            state_SHDE[slot] = prompt.layers[layer].state_HDE
            counts_S[slot] = position
        self._owners.append(owner)

    def release(self, owner: Owner) -> None:
        """The last slot moves into the hole."""
        hole, last = self._owners.index(owner), len(self._owners) - 1
        if hole != last:
            for parts in self._layers.values():
                for part in parts:
                    part[hole] = part[last]
            self._owners[hole] = self._owners[last]
        self._owners.pop()
        if 4 * len(self._owners) < self.num_slots:
            self._resize(2 * len(self._owners))

    def arrange(self, owners: Sequence[Owner]) -> None:
        """The order of the rows of decode steps: all who have slots."""
        row_of = {owner: row for row, owner in enumerate(owners)}
        rows = [row_of[owner] for owner in self._owners] if owners else []
        self._row_of_slot_N = torch.tensor(rows, dtype=torch.int64, device=self._device)

    def seek(self, positions_N: Tensor) -> None:
        """Prepare the step that computes `positions_N` (int64), by row."""
        self._positions_N = positions_N.index_select(0, self._row_of_slot_N)

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        """[T, H, E]; zero in rows that are nobody's."""
        out_THE = mixed_TC.new_zeros(len(mixed_TC), kind.heads, kind.value_size)
        num = len(self._row_of_slot_N)
        rows_NKC, state_NHDE, counts_N = (part[:num] for part in self._layers[layer])
        is_new_N = counts_N == self._positions_N
        mixed_NC, g_NH, beta_NH = (x.index_select(0, self._row_of_slot_N) for x in (mixed_TC, g_TH, beta_TH))
        out_NHE = step(mixed_NC, g_NH, beta_NH, kind, rows_NKC, state_NHDE, is_new_N)
        counts_N.copy_(self._positions_N + 1)
        return out_THE.index_copy_(0, self._row_of_slot_N, out_NHE)

    def _resize(self, num_slots: int) -> None:
        """Layer by layer, so that only one layer is there twice."""
        num = len(self._owners)
        for layer, shape in self._shapes.items():
            parts = (
                torch.zeros(num_slots, shape.taps, shape.channels, dtype=shape.dtype, device=self._device),
                torch.zeros(num_slots, shape.heads, shape.key_size, shape.value_size, device=self._device),
                torch.zeros(num_slots, dtype=torch.int64, device=self._device),
            )
            for new, old in zip(parts, self._layers.get(layer, ()), strict=False):
                new[:num] = old[:num]
            self._layers[layer] = parts
        self.num_slots = num_slots


def empty_state(shape: StateShape, device: torch.device) -> LayerState:
    """Before the first token."""
    rows_KC = torch.zeros(shape.taps, shape.channels, dtype=shape.dtype, device=device)
    return LayerState(rows_KC, torch.zeros(shape.heads, shape.key_size, shape.value_size, device=device))


def num_bytes(states: States | None) -> int:
    return 0 if states is None else sum(state.num_bytes for state in states.values())
