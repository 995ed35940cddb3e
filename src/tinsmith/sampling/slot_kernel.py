"""The LoRA of decode rows in experts, in Triton: two kernels with a program for each slot and some columns.

    shrink   u[slot] = scale · A[expert] x[slot]        one program for 16 columns of u
    expand   y[slot] += B[expert] u[slot]               one program for 128 columns of y

With the few rows of a decode step nearly every slot has another expert, so there is nothing to gather in tiles: the
time is that of reading the matrices, and neighbouring slots, which are sorted by expert, find them in the cache. The
grids are fixed by the number of slots and the shape of the batch alone. Sums are float32; u is rounded to x's dtype.
The plain reference is `slot_lora.add_slots_plainly`. Importing this needs triton, and where there is no GPU
TRITON_INTERPRET=1 set before.
Shape letters: see `slot_lora`; W inputs or outputs that are taken at a time, C columns of u.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tinsmith.model import Routes
from tinsmith.model.lora.tables import output_blocks
from tinsmith.sampling.slot_lora import UNIT, SlotGroup, SlotShape, SlotTables

SUM_BLOCK = 256  # inputs that shrink adds up at a time
SHRINK_BLOCK = 16  # columns of u of one program
EXPAND_BLOCK = 128  # columns of y of one program
MAX_RANK_BLOCK = 64


def add_slots(
    tables: SlotTables, group: SlotGroup, shape: SlotShape, routes: Routes, x_NI: Tensor, y_NO: Tensor
) -> None:
    """y += the adapters' part, in place. Launches depend on the shapes of x and y, the group and `shape` alone."""
    num_layers, width = len(group.widths), len(group.widths) * shape.rank_class
    unit = UNIT if shape.is_aligned else 1
    num_rows = len(routes.experts_TK)
    u_NC = x_NI.new_empty(len(x_NI), width)
    places_LF = tables.places_GLF[group.index]
    _shrink_slots[(len(x_NI), triton.cdiv(width, SHRINK_BLOCK))](
        x_NI, tables.anchor, u_NC, routes.keys_P, tables.owners_B, places_LF, tables.scales_GLF[group.index], num_rows,
        tables.num_adapters, x_NI.stride(0), u_NC.stride(0),
        INPUTS=group.inputs, LAYERS=num_layers, SHARES=group.shares_a, UNIT=unit, BW=SUM_BLOCK, BN=SHRINK_BLOCK,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    blocks, num_blocks = output_blocks(group.widths, EXPAND_BLOCK, x_NI.device)
    _expand_slots[(len(x_NI), num_blocks)](
        u_NC, tables.anchor, y_NO, routes.keys_P, tables.owners_B, places_LF, blocks, num_rows, tables.num_adapters,
        num_blocks, u_NC.stride(0), y_NO.stride(0), SHARES=group.shares_b, UNIT=unit, ALIGNED=shape.is_aligned,
        BW=EXPAND_BLOCK, BN=min(MAX_RANK_BLOCK, shape.rank_class), num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit
def _shrink_slots(
    x, anchor, narrow, keys, owners, places, scales, num_rows, capacity, x_stride, narrow_stride,
    INPUTS: tl.constexpr, LAYERS: tl.constexpr, SHARES: tl.constexpr, UNIT: tl.constexpr,
    BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + slot)
    owner = tl.load(owners + key % num_rows)
    if owner >= 0:
        rank = tl.load(places + owner).to(tl.int32)
        num_columns = LAYERS * rank
        if tl.program_id(1) * BN < num_columns:
            columns = tl.program_id(1) * BN + tl.arange(0, BN)
            is_column = columns < num_columns
            matrix = anchor + tl.load(places + capacity + owner) * UNIT
            if not SHARES:
                matrix += key // num_rows * (num_columns * INPUTS)
            acc = tl.zeros((BN,), tl.float32)
            for start in range(0, INPUTS, BW):
                ws = start + tl.arange(0, BW)
                is_w = ws < INPUTS
                x_W = tl.load(x + slot * x_stride + ws, mask=is_w, other=0.0).to(tl.float32)
                a_NW = tl.load(
                    matrix + columns[:, None] * INPUTS + ws[None, :],
                    mask=is_column[:, None] & is_w[None, :],
                    other=0.0,
                )
                acc += tl.sum(a_NW.to(tl.float32) * x_W[None, :], 1)
            layers = columns // rank
            acc = acc * tl.load(scales + layers * capacity + owner, mask=is_column, other=0.0)
            tl.store(narrow + slot * narrow_stride + columns, acc.to(narrow.dtype.element_ty), mask=is_column)


@triton.jit
def _expand_slots(
    narrow, anchor, y, keys, owners, places, blocks, num_rows, capacity, num_blocks, narrow_stride, y_stride,
    SHARES: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    slot, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = tl.load(keys + slot)
    owner = tl.load(owners + key % num_rows)
    if owner >= 0:
        rank = tl.load(places + owner).to(tl.int32)
        if rank > 0:
            layer, first = tl.load(blocks + block), tl.load(blocks + num_blocks + block)
            width, start_of_layer = tl.load(blocks + 2 * num_blocks + block), tl.load(blocks + 3 * num_blocks + block)
            if ALIGNED:
                rank = tl.multiple_of(rank, 8)
                width, start_of_layer = tl.multiple_of(width, 8), tl.multiple_of(start_of_layer, 8)
            ws = tl.multiple_of(first, BW) + tl.arange(0, BW)
            is_w = ws < width
            matrix = anchor + tl.load(places + (2 + layer) * capacity + owner) * UNIT
            if not SHARES:
                matrix += key // num_rows * (width * rank)
            acc = tl.zeros((BW,), tl.float32)
            for start in range(0, rank, BN):
                columns = start + tl.arange(0, BN)
                is_column = columns < rank
                u_N = tl.load(narrow + slot * narrow_stride + layer * rank + columns, mask=is_column, other=0.0).to(
                    tl.float32
                )
                b_WN = tl.load(
                    matrix + ws[:, None] * rank + columns[None, :],
                    mask=is_w[:, None] & is_column[None, :],
                    other=0.0,
                )
                acc += tl.sum(b_WN.to(tl.float32) * u_N[None, :], 1)
            out = y + slot * y_stride + start_of_layer + ws
            base_W = tl.load(out, mask=is_w, other=0.0).to(tl.float32)
            tl.store(out, (base_W + acc).to(y.dtype.element_ty), mask=is_w)
