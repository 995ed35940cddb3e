"""The tensors of keys and values. `blocks` decides who gets memory; here it is laid out.

A sequence's KV is contiguous in each layer. Sequences of one length class (the same number of blocks) lie side by
side in one arena, so that decode attention over a class is one call without gathering or copying. A sequence that
outgrows its class moves to the next arena. Up to `LONG_BLOCKS` classes are a block apart, and attention reads all of a
slot; from there on a class is a quarter wider than the one before, so that a sequence is copied some four times in its
life, however long, and attention reads of each slot what its own sequence has, in blocks.

What stays true: slots 0..n-1 of an arena hold its n sequences; positions of a slot that its sequence has not reached
are finite, so masked positions can't poison it; arenas and prompts together hold at most `total` blocks between calls
(during one, a sequence on the move is there twice, and so is one layer of an arena that is resized).
Shape letters: L layers, C slots of an arena, G key/value heads, W positions of a slot, D head size, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tinsmith.sampling.blocks import BLOCK_TOKENS, num_blocks
from tinsmith.sampling.states import PromptStates, SequenceStates, Shapes, States, num_bytes

LONG_BLOCKS = 16

Owner = TypeVar("Owner", bound=Hashable)


def wider(size: int) -> int:
    """The blocks that a sequence gets when it needs `size`, if there are enough."""
    return size if size <= LONG_BLOCKS else size * 5 // 4


@dataclass(frozen=True, slots=True)
class KVShape:
    """heads: (key/value heads, head size) of each layer, none of one that keeps a state. states: of those, by layer.
    grid: positions at whose multiples states of prompts are kept for later; 0 for nowhere."""

    heads: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    device: torch.device
    states: Shapes = field(default_factory=dict)
    grid: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of 64 tokens in all layers."""
        return 2 * BLOCK_TOKENS * self.dtype.itemsize * sum(heads * size for heads, size in self.heads)

    @property
    def state_blocks(self) -> int:
        """Blocks that take as much memory as one sequence's states."""
        return -(-sum(shape.num_bytes for shape in self.states.values()) // self.block_bytes)

    def prompt_states(self) -> PromptStates:
        """States are kept as often as takes the memory of the keys and values between."""
        stride = max(1, self.state_blocks * BLOCK_TOKENS // max(self.grid, 1))
        return PromptStates(self.states, self.device, self.grid, stride)


class Kept(Protocol):
    """Keys and values of some positions, kept for later; only the layout that made them can read them.

    states: of a model that has any, those after these positions, if they are known.
    """

    states: States | None

    @property
    def num_bytes(self) -> int: ...

    def drop(self) -> None:
        """Nobody asks for them any more."""
        ...


@dataclass(slots=True)
class Copies:
    """See `Kept`. layers: each [2, G, N, D], keys first."""

    layers: Sequence[Tensor]
    states: States | None = None

    @property
    def num_bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers) + num_bytes(self.states)

    def drop(self) -> None:
        pass


class PromptKV:
    """Keys and values of one prompt while it is computed and until its sequences have their copies.

    layers: each [2, G, P, D], keys first.
    """

    def __init__(self, shape: KVShape, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.states = shape.prompt_states()
        self.layers: list[Tensor] = [
            torch.empty(2, heads, num_tokens, size, dtype=shape.dtype, device=shape.device)
            for heads, size in shape.heads
        ]

    def put(self, layer: int, start: int, k_GND: Tensor, v_GND: Tensor) -> tuple[Tensor, Tensor]:
        """Write N positions from `start` on; keys and values of all up to there, [G, start + N, D] each."""
        end = start + k_GND.shape[1]
        k_GPD, v_GPD = self.layers[layer]
        k_GPD[:, start:end] = k_GND
        v_GPD[:, start:end] = v_GND
        return k_GPD[:, :end], v_GPD[:, :end]

    def load(self, start: int, kept: Kept) -> None:
        """Take positions from `start` on, in all layers."""
        assert isinstance(kept, Copies), "made by this layout"
        for layer, part in zip(self.layers, kept.layers, strict=True):
            layer[:, :, start : start + part.shape[2]] = part
        if kept.states is not None:
            self.states.load(start + kept.layers[0].shape[2], kept.states)

    def save(self, start: int, end: int) -> Kept:
        """Positions start..end-1."""
        return Copies([layer[:, :, start:end].clone() for layer in self.layers], self.states.at(end))


class Arena(Generic[Owner]):
    """All sequences of one length class. layers: each [2, C, G, W, D]; owners[i] holds slot i."""

    def __init__(self, shape: KVShape, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_positions = num_blocks * BLOCK_TOKENS
        self.num_slots = 0
        self.owners: list[Owner] = []
        self._slots: dict[Owner, int] = {}
        self.layers: list[Tensor] = [
            torch.zeros(2, 0, heads, self.num_positions, size, dtype=shape.dtype, device=shape.device)
            for heads, size in shape.heads
        ]

    @property
    def num_allocated_blocks(self) -> int:
        return self.num_slots * self.num_blocks

    @property
    def is_long(self) -> bool:
        """Its sequences may be of different lengths, in blocks."""
        return self.num_blocks > LONG_BLOCKS

    def resize(self, num_slots: int) -> None:
        """Layer by layer, so that only one layer is there twice."""
        kept = len(self.owners)
        for index, old in enumerate(self.layers):
            _, _, heads, width, size = old.shape
            new = old.new_zeros(2, num_slots, heads, width, size)
            new[:, :kept] = old[:, :kept]
            self.layers[index] = new
        self.num_slots = num_slots

    def take(self, owner: Owner, sources: Iterable[Tensor], num_tokens: int) -> None:
        """Fill the next free slot from one [2, G, >= num_tokens, D] per layer, and clear the positions after them."""
        slot = len(self.owners)
        for layer, source in zip(self.layers, sources, strict=True):
            layer[:, slot, :, :num_tokens] = source[:, :, :num_tokens]
            layer[:, slot, :, num_tokens:] = 0
        self._slots[owner] = slot
        self.owners.append(owner)

    def slot(self, owner: Owner) -> list[Tensor]:
        """Its keys and values of each layer: views."""
        slot = self._slots[owner]
        return [layer[:, slot] for layer in self.layers]

    def remove(self, owner: Owner) -> None:
        """The last slot moves into the hole."""
        hole, last = self._slots.pop(owner), len(self.owners) - 1
        moved = self.owners.pop()
        if hole != last:
            for layer in self.layers:
                layer[:, hole] = layer[:, last]
            self.owners[hole] = moved
            self._slots[moved] = hole


class KVCache(Generic[Owner]):
    """All KV memory of a sampler. `version` changes whenever a sequence gets, changes or leaves its slot. states: of
    the sequences, in a model that has any."""

    def __init__(self, shape: KVShape, total: int) -> None:
        self.shape = shape
        self.total = total
        self.version = 0
        self.states = SequenceStates[Owner](shape.states, shape.device) if shape.states else None
        self._arenas: dict[int, Arena[Owner]] = {}
        self._prompts: dict[Hashable, PromptKV] = {}
        self._prompt_blocks = 0

    @property
    def arenas(self) -> Sequence[Arena[Owner]]:
        """Shortest class first."""
        return [self._arenas[size] for size in sorted(self._arenas)]

    @property
    def num_allocated_blocks(self) -> int:
        num_states = 0 if self.states is None else self.states.num_slots + len(self._prompts)
        arenas = sum(arena.num_allocated_blocks for arena in self._arenas.values())
        return self._prompt_blocks + arenas + num_states * self.shape.state_blocks

    def num_shared(self, num_tokens: int) -> int:
        """Blocks of a prompt that its sequences have in common."""
        return 0

    def open_prompt(self, owner: Hashable, num_tokens: int) -> PromptKV:
        self._make_room(num_blocks(num_tokens))
        prompt = PromptKV(self.shape, num_tokens)
        self._prompts[owner] = prompt
        self._prompt_blocks += num_blocks(num_tokens)
        return prompt

    def close_prompt(self, owner: Hashable) -> None:
        prompt = self._prompts.pop(owner, None)
        if prompt is not None:
            self._prompt_blocks -= num_blocks(prompt.num_tokens)

    def save(self, owner: Owner, size: int, start: int, end: int) -> Kept:
        """Positions start..end-1 of a sequence."""
        arena = self._arenas[size]
        return Copies([layer[:, :, start:end].clone() for layer in arena.slot(owner)])

    def place(self, owner: Owner, prompt_owner: Hashable, size: int) -> None:
        """Give a new sequence a slot of `size` blocks that begins with an open prompt."""
        prompt = self._prompts[prompt_owner]
        self._arena_with_room(size).take(owner, prompt.layers, prompt.num_tokens)
        if self.states is not None:
            self.states.place(owner, prompt.states)
        self.version += 1

    def move(self, owner: Owner, size: int, new_size: int, num_tokens: int) -> None:
        """Move a sequence with `num_tokens` filled positions from class `size` to `new_size`."""
        old = self._arenas[size]
        self._arena_with_room(new_size).take(owner, old.slot(owner), num_tokens)
        self._vacate(owner, size)

    def release(self, owner: Owner, size: int) -> None:
        if self.states is not None:
            self.states.release(owner)
        self._vacate(owner, size)

    def _vacate(self, owner: Owner, size: int) -> None:
        arena = self._arenas[size]
        arena.remove(owner)
        if not arena.owners:
            del self._arenas[size]
        elif len(arena.owners) * 4 < arena.num_slots:
            arena.resize(len(arena.owners) * 2)
        self._make_room(0)
        self.version += 1

    def _arena_with_room(self, size: int) -> Arena[Owner]:
        arena = self._arenas.get(size)
        if arena is None:
            arena = self._arenas[size] = Arena(self.shape, size)
        if len(arena.owners) < arena.num_slots:
            return arena
        wanted = max(1, arena.num_slots // 2)  # so that filling it copies each of its sequences a few times
        if self.num_allocated_blocks + wanted * size > self.total:
            self._make_room(size)
            left = self.total - self.num_allocated_blocks
            wanted = max(1, min(wanted, left // 4 // size))
        arena.resize(arena.num_slots + wanted)
        return arena

    def _make_room(self, num_blocks: int) -> None:
        """Return the slack of all arenas if `num_blocks` more would exceed the total."""
        if self.num_allocated_blocks + num_blocks <= self.total:
            return
        for arena in self._arenas.values():
            if arena.num_slots > len(arena.owners):
                arena.resize(len(arena.owners))
