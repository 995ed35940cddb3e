"""The matrices of many adapters for one group of layers, stacked, and their product with a tile of rows each.

With few rows an adapter costs its reading from memory. How matrices lie, and which operand goes first, decides between
kernels that differ by a factor of two to six at one row (dev/LOG.md, "adapters at the speed of memory"). For tiles of
one or two rows they lie as they were trained, A [K, I] and B [C, R]; u is A x with x as a column, and the rest u Bᵀ.
For larger tiles they lie turned, [I, K] and [R, C], and so does a B of wide outputs for any. A group's LoRA is two
products, whatever the number of adapters: outputs are cut into pieces of one width, each of which belongs to one layer.
Shape letters: S slots, M rows of a tile, I inputs, O outputs of a layer, R rank (the rank class), L layers of a group,
K = L · R or more, P pieces of a block, C columns of a piece, N = S · M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from tinsmith.model.lora import LoraWeights

COLUMN_GRID = 16
WIDE = 2048  # outputs of a piece, from which on a turned B is read faster by one row as well


def padded_columns(num_columns: int) -> int:
    """The rows of a stacked A. A product of 24 columns is split over three threads into kernels of its own."""
    return num_columns if num_columns <= COLUMN_GRID else -(-num_columns // COLUMN_GRID) * COLUMN_GRID


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring layers of a group whose outputs are cut into pieces of one width, for one product.

    layers: the layer of each piece. columns: those of the first piece, and the end of the last.
    """

    layers: tuple[int, ...]
    width: int
    columns: tuple[int, int]


def blocks_of(widths: Sequence[int]) -> list[Block]:
    """One if the narrowest layer's width divides all, as it does for queries, keys and values; else one a layer."""
    least, ends = min(widths), list(accumulate(widths))
    if all(width % least == 0 for width in widths):
        return [Block(tuple(i for i, width in enumerate(widths) for _ in range(width // least)), least, (0, ends[-1]))]
    return [Block((i,), width, (end - width, end)) for i, (width, end) in enumerate(zip(widths, ends, strict=True))]


@dataclass(frozen=True, slots=True)
class StackedGroup:
    """All zero at first. Adapters' ranks may be less than `rank`, and their scale is in B.

    a: [S, K, I], turned [S, I, K]. bs: of each block [S, P, C, R], turned [S, P, R, C]. turned: whether a is, and each
    of bs. pieces: of each block the layers of its pieces, int64 [P]; None where they are all layers, once each.
    """

    rank: int
    num_layers: int
    blocks: Sequence[Block]
    pieces: Sequence[Tensor | None]
    turned: tuple[bool, ...]
    a: Tensor
    bs: Sequence[Tensor]

    @classmethod
    def like(cls, weights: LoraWeights, rank: int, num_slots: int, is_turned: bool) -> StackedGroup:
        """Room for adapters of the shapes of this one."""
        num_layers = len(weights.bs)

        def room(turn: bool, *shape: int) -> Tensor:
            lying = (*shape[:-2], shape[-1], shape[-2]) if turn else shape
            return weights.a_KI.new_zeros(num_slots, *lying)

        blocks = blocks_of([len(b_OR) for b_OR in weights.bs])
        turned = (is_turned, *(is_turned or block.width >= WIDE for block in blocks))
        pieces = [
            None if block.layers == tuple(range(num_layers)) else torch.tensor(block.layers, device=weights.a_KI.device)
            for block in blocks
        ]
        a = room(is_turned, padded_columns(num_layers * rank), weights.a_KI.shape[1])
        bs = [room(turn, len(block.layers), block.width, rank) for turn, block in zip(turned[1:], blocks, strict=True)]
        return cls(rank, num_layers, blocks, pieces, turned, a, bs)

    @property
    def stacks(self) -> Sequence[Tensor]:
        return (self.a, *self.bs)

    def between(self, first: int, last: int) -> StackedGroup:
        """Slots first..last-1."""
        return replace(self, a=self.a[first:last], bs=[b[first:last] for b in self.bs])

    def fill(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter into a slot."""
        a_KI, *bs = (
            stack[slot].mT if turn else stack[slot] for turn, stack in zip(self.turned, self.stacks, strict=True)
        )
        rank = weights.rank
        if rank < self.rank:
            for matrix in (a_KI, *bs):
                matrix.zero_()
        for index, a_RI in enumerate(torch.split(weights.a_KI, rank)):
            a_KI[index * self.rank : index * self.rank + rank] = a_RI
        for block, b_PCR in zip(self.blocks, bs, strict=True):
            for place_CR, layer, start in zip(b_PCR, block.layers, starts_of(block.layers), strict=True):
                from_CR = weights.bs[layer][start * block.width : (start + 1) * block.width]
                torch.mul(from_CR, weights.scales[layer], out=place_CR[:, :rank])

    def times(self, x_SMI: Tensor) -> list[Tensor]:
        """(x Aᵀ) Bᵀ with each slot's own adapter, for each block: [N, P · C]."""
        num, tile, _ = x_SMI.shape
        if self.turned[0]:
            u_SMK = torch.bmm(x_SMI, self.a)
        else:
            u_SKM = torch.bmm(self.a, x_SMI.mT)
            u_SMK = u_SKM.view(num, 1, -1) if tile == 1 else u_SKM.mT
        u_SMLR = u_SMK[:, :, : self.num_layers * self.rank].view(num, tile, self.num_layers, self.rank)
        parts = []
        for pieces, turn, b in zip(self.pieces, self.turned[1:], self.bs, strict=True):
            u_SMPR = u_SMLR if pieces is None else u_SMLR.index_select(2, pieces)
            u_NMR = u_SMPR.transpose(1, 2).reshape(-1, tile, self.rank)
            y_NMC = torch.bmm(u_NMR, b.flatten(0, 1) if turn else b.flatten(0, 1).mT)
            parts.append(y_NMC.view(num, -1, tile, y_NMC.shape[2]).transpose(1, 2).reshape(num * tile, -1))
        return parts


def starts_of(layers: Sequence[int]) -> list[int]:
    """Which piece of its layer each one is."""
    return [index - layers.index(layer) for index, layer in enumerate(layers)]
