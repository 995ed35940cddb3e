"""Keys and values in pages: blocks of 64 tokens in one pool a layer, and a table of blocks for each sequence.

The layout for GPUs, where gathering costs nothing that reading doesn't. It has the face of `kv.KVCache`. The samples
of a prompt share its whole blocks, which are counted; each has a copy of its own of the last, partial one, into which
it goes on writing. What is kept of a beginning are its blocks themselves, and a prompt that begins alike has them in
its table. What stays true: a block that more than one holds is never written anew; every block is free or held.
Shape letters: P blocks of the pool, K tokens of a block, G key/value heads, D head size, N tokens or sequences, B
blocks of a table, H query heads, E positions up to an end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from tinsmith.model.attention import AttentionKind
from tinsmith.sampling.blocks import BLOCK_TOKENS, num_blocks
from tinsmith.sampling.kv import Copies, Kept, KVShape, Owner
from tinsmith.sampling.paged_attention import paged_attention
from tinsmith.sampling.states import SequenceStates, States, num_bytes


class Pool:
    """layers: each [2, P, K, G, D], keys first. The last block is nobody's: rows of padding read it.

    One block more than `total`: a sample's copy of a partial block is made before its prompt is closed.
    """

    def __init__(self, shape: KVShape, total: int) -> None:
        self.padding = total + 1
        self.layers: list[Tensor] = [
            torch.zeros(2, total + 2, BLOCK_TOKENS, heads, size, dtype=shape.dtype, device=shape.device)
            for heads, size in shape.heads
        ]
        self.block_bytes = shape.block_bytes
        self.shape = shape
        self._num_holders = [0] * (total + 1)
        self._num_kept = [0] * (total + 1)  # of those, pieces that are kept for later
        self._free = list(range(total, -1, -1))

    @property
    def num_held(self) -> int:
        """Blocks that prompts and sequences hold; not those that are only kept for later."""
        return sum(holders > kept for holders, kept in zip(self._num_holders, self._num_kept, strict=True))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        blocks = [self._free.pop() for _ in range(count)]
        self.share(blocks)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._num_holders[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                self._free.append(block)

    def keep(self, table: Sequence[int], start: int, end: int, states: States | None = None) -> Kept:
        """Positions start..end-1 of a sequence: the blocks themselves if these are whole ones, which are written to
        the end then; else copies."""
        if start % BLOCK_TOKENS or end % BLOCK_TOKENS:
            return Copies(self.read(table, start, end), states)
        blocks = tuple(table[start // BLOCK_TOKENS : end // BLOCK_TOKENS])
        self.share(blocks)
        for block in blocks:
            self._num_kept[block] += 1
        return Pages(self, blocks, states)

    def forget(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._num_kept[block] -= 1
        self.drop(blocks)

    def copy(self, source: int, target: int) -> None:
        for layer in self.layers:
            layer[:, target] = layer[:, source]

    def rows(self, table: Sequence[int], start: int, end: int) -> Tensor:
        """int64: where positions start..end-1 are in a layer seen as [2, P * K, G, D]."""
        device = self.layers[0].device
        positions = torch.arange(start, end, device=device)
        return torch.tensor(table, device=device)[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS

    def read(self, table: Sequence[int], start: int, end: int) -> list[Tensor]:
        """Copies, each [2, G, N, D]."""
        rows = self.rows(table, start, end)
        return [layer.flatten(1, 2)[:, rows].transpose(1, 2) for layer in self.layers]


@dataclass(slots=True)
class Pages:
    """See `kv.Kept`."""

    pool: Pool
    blocks: tuple[int, ...]
    states: States | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.blocks) * self.pool.block_bytes + num_bytes(self.states)

    def drop(self) -> None:
        self.pool.forget(self.blocks)


class PagedPrompt:
    """See `kv.PromptKV`."""

    def __init__(self, pool: Pool, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.table = pool.take(num_blocks(num_tokens))
        self.states = pool.shape.prompt_states()
        self._pool = pool

    def put(self, layer: int, start: int, k_GND: Tensor, v_GND: Tensor) -> tuple[Tensor, Tensor]:
        end = start + k_GND.shape[1]
        pages = self._pool.layers[layer].flatten(1, 2)
        rows = self._pool.rows(self.table, start, end)
        pages[0].index_copy_(0, rows, k_GND.transpose(0, 1))
        pages[1].index_copy_(0, rows, v_GND.transpose(0, 1))
        k_GED, v_GED = pages[:, self._pool.rows(self.table, 0, end)].transpose(1, 2)
        return k_GED, v_GED

    def load(self, start: int, kept: Kept) -> None:
        """Nothing is copied where blocks were kept: they take the place of the prompt's own."""
        if isinstance(kept, Pages):
            own = slice(start // BLOCK_TOKENS, start // BLOCK_TOKENS + len(kept.blocks))
            self._pool.share(kept.blocks)
            self._pool.drop(self.table[own])
            self.table[own] = kept.blocks
            if kept.states is not None:
                self.states.load(start + len(kept.blocks) * BLOCK_TOKENS, kept.states)
            return
        assert isinstance(kept, Copies), "made by this layout"
        end = start + kept.layers[0].shape[2]
        if kept.states is not None:
            self.states.load(end, kept.states)
        rows = self._pool.rows(self.table, start, end)
        for pages, part in zip(self._pool.layers, kept.layers, strict=True):
            pages.flatten(1, 2).index_copy_(1, rows, part.transpose(1, 2))

    def save(self, start: int, end: int) -> Kept:
        return self._pool.keep(self.table, start, end, self.states.at(end))


class PagedKV(Generic[Owner]):
    """See `kv.KVCache`. tables: the blocks of each sequence, in the order of their rows in a decode walk."""

    def __init__(self, shape: KVShape, total: int, max_kept_bytes: int = 0) -> None:
        """max_kept_bytes: of what `save` gave and nobody dropped yet, beside the `total` blocks."""
        self.shape = shape
        self.total = total
        self.version = 0
        self.states = SequenceStates[Owner](shape.states, shape.device) if shape.states else None
        self.pool = Pool(shape, total + max_kept_bytes // shape.block_bytes)
        self.tables: dict[Owner, list[int]] = {}
        self._prompts: dict[Hashable, PagedPrompt] = {}

    @property
    def num_allocated_blocks(self) -> int:
        return self.pool.num_held

    def num_shared(self, num_tokens: int) -> int:
        """Whole blocks of a prompt, which its sequences have in common."""
        return num_tokens // BLOCK_TOKENS

    def open_prompt(self, owner: Hashable, num_tokens: int) -> PagedPrompt:
        prompt = self._prompts[owner] = PagedPrompt(self.pool, num_tokens)
        return prompt

    def close_prompt(self, owner: Hashable) -> None:
        prompt = self._prompts.pop(owner, None)
        if prompt is not None:
            self.pool.drop(prompt.table)

    def place(self, owner: Owner, prompt_owner: Hashable, size: int) -> None:
        """A new sequence of `size` blocks, which shares the whole blocks of an open prompt."""
        prompt = self._prompts[prompt_owner]
        shared = prompt.table[: prompt.num_tokens // BLOCK_TOKENS]
        self.pool.share(shared)
        own = self.pool.take(size - len(shared))
        if len(shared) < len(prompt.table):
            self.pool.copy(prompt.table[-1], own[0])
        self.tables[owner] = [*shared, *own]
        if self.states is not None:
            self.states.place(owner, prompt.states)
        self.version += 1

    def move(self, owner: Owner, size: int, new_size: int, num_tokens: int) -> None:
        """More blocks; nothing is copied."""
        self.tables[owner] += self.pool.take(new_size - size)
        self.version += 1

    def release(self, owner: Owner, size: int) -> None:
        self.pool.drop(self.tables.pop(owner))
        if self.states is not None:
            self.states.release(owner)
        self.version += 1

    def save(self, owner: Owner, size: int, start: int, end: int) -> Kept:
        return self.pool.keep(self.tables[owner], start, end)


class PagedRows:
    """Decode attention of rows whose tables and lengths are tensors: nothing here looks at a number on the host."""

    def __init__(self, pool: Pool, tables_NB: Tensor, positions_N: Tensor) -> None:
        """For the step that writes `positions_N` (int64) and attends up to them."""
        self._pool = pool
        self._tables_NB = tables_NB
        block_N1 = tables_NB.gather(1, positions_N[:, None] // BLOCK_TOKENS)
        self._rows_N = block_N1[:, 0] * BLOCK_TOKENS + positions_N % BLOCK_TOKENS
        self._lengths_N = positions_N + 1

    def attend(self, layer: int, q_NHD: Tensor, k_GND: Tensor, v_GND: Tensor, kind: AttentionKind) -> Tensor:
        """[N, H, D]; writes k and v first."""
        k_PKGD, v_PKGD = self._pool.layers[layer]
        k_PKGD.flatten(0, 1).index_copy_(0, self._rows_N, k_GND.transpose(0, 1))
        v_PKGD.flatten(0, 1).index_copy_(0, self._rows_N, v_GND.transpose(0, 1))
        return paged_attention(q_NHD, k_PKGD, v_PKGD, self._tables_NB, self._lengths_N, kind)


class PagedGroup(Generic[Owner]):
    """All sequences in one call of attention, whatever their lengths. See `contexts.DecodeGroup`."""

    def __init__(self, kv: PagedKV[Owner], device: torch.device) -> None:
        self.owners = list(kv.tables)
        self.first = 0
        self.last = len(self.owners)
        self._pool = kv.pool
        widest = max(map(len, kv.tables.values()), default=0)
        padded = [[*table, *[kv.pool.padding] * (widest - len(table))] for table in kv.tables.values()]
        self._tables_NB = torch.tensor(padded, dtype=torch.int64, device=device).reshape(-1, widest)
        self._rows: PagedRows | None = None

    def seek(self, positions_N: Tensor, dtype: torch.dtype) -> None:
        """Prepare the step that writes `positions_N` (int64) and attends up to them."""
        self._rows = PagedRows(self._pool, self._tables_NB, positions_N)

    def attend(self, layer: int, q_NHD: Tensor, k_GND: Tensor, v_GND: Tensor, kind: AttentionKind) -> Tensor:
        """[N, H, D]; writes k and v first."""
        assert self._rows is not None, "sought first"
        return self._rows.attend(layer, q_NHD, k_GND, v_GND, kind)
