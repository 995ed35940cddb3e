"""The LoRA of decode rows in Triton: two kernels over tiles of up to 16 rows of one adapter each.

    shrink   u[rows] = scale · x[rows] Aᵀ        one program for 16 columns of u
    expand   y[rows] += u[rows] Bᵀ               one program for 128 columns of y

The grids are fixed by the shape of the batch alone (`TileShape`, and room for so many rows); how many tiles there are
is read on the device, and each program goes through tiles some steps apart. So a captured launch stays right whoever is
in the batch. Sums are float32; u is rounded to x's dtype. The plain reference is `tiled_lora.add_tiles_plainly`.
Importing this needs triton, and where there is no GPU TRITON_INTERPRET=1 set before.
Shape letters: see `tiled_lora`; W inputs or outputs that are taken at a time, K columns of u, N of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tinsmith.model.lora.dot import dot, precision_of
from tinsmith.model.lora.tables import output_blocks
from tinsmith.sampling.tiled_lora import TILE_ROWS, UNIT, TileGroup, TileShape, TileTables

TILE_PROGRAMS = 32  # tiles that are gone through side by side
SUM_BLOCK = 256  # inputs that shrink adds up at a time
SHRINK_BLOCK = 16  # columns of u of one program
EXPAND_BLOCK = 128  # columns of y of one program
MAX_RANK_BLOCK = 64


def add_tiles(tables: TileTables, group: TileGroup, shape: TileShape, x_TI: Tensor, y_TO: Tensor) -> None:
    """y += the adapters' part, in place. Launches depend on the shapes of x and y, the group and `shape` alone."""
    num_layers, width = len(group.widths), len(group.widths) * shape.rank_class
    programs = min(TILE_PROGRAMS, len(x_TI))
    unit = UNIT if shape.is_aligned else 1
    precision = precision_of(x_TI)
    u_TK = x_TI.new_empty(len(x_TI), width)
    places_LT = tables.places_GLT[group.index]
    _shrink_tiles[(programs, triton.cdiv(width, SHRINK_BLOCK))](
        x_TI, tables.anchor, u_TK, tables.rows_TM, tables.count, places_LT, tables.scales_GLT[group.index],
        tables.capacity,
        x_TI.stride(0), u_TK.stride(0), INPUTS=group.inputs, LAYERS=num_layers, PROGRAMS=programs, UNIT=unit,
        PRECISION=precision, BT=TILE_ROWS, BW=SUM_BLOCK, BN=SHRINK_BLOCK,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    blocks, num_blocks = output_blocks(group.widths, EXPAND_BLOCK, x_TI.device)
    _expand_tiles[(programs, num_blocks)](
        u_TK, tables.anchor, y_TO, tables.rows_TM, tables.count, places_LT, blocks, tables.capacity, num_blocks,
        u_TK.stride(0), y_TO.stride(0), PROGRAMS=programs, UNIT=unit, ALIGNED=shape.is_aligned, PRECISION=precision,
        BT=TILE_ROWS, BW=EXPAND_BLOCK, BN=min(MAX_RANK_BLOCK, shape.rank_class), num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit
def _shrink_tiles(
    x, anchor, narrow, rows_at, count, places, scales, capacity, x_stride, narrow_stride,
    INPUTS: tl.constexpr, LAYERS: tl.constexpr, PROGRAMS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    for tile in range(tl.program_id(0), tl.load(count), PROGRAMS):
        rank = tl.load(places + tile).to(tl.int32)
        num_columns = LAYERS * rank
        if tl.program_id(1) * BN < num_columns:
            rows = tl.load(rows_at + tile * BT + tl.arange(0, BT)).to(tl.int64)
            is_row, is_column = rows >= 0, columns < num_columns
            matrix = anchor + tl.load(places + capacity + tile) * UNIT
            acc = tl.zeros((BT, BN), tl.float32)
            for start in range(0, INPUTS, BW):
                ws = start + tl.arange(0, BW)
                is_w = ws < INPUTS
                x_TW = tl.load(
                    x + rows[:, None] * x_stride + ws[None, :], mask=is_row[:, None] & is_w[None, :], other=0.0
                )
                a_NW = tl.load(
                    matrix + columns[:, None] * INPUTS + ws[None, :],
                    mask=is_column[:, None] & is_w[None, :],
                    other=0.0,
                )
                acc = dot(x_TW, tl.trans(a_NW), acc, PRECISION)
            layers = columns // rank
            acc = acc * tl.load(scales + layers * capacity + tile, mask=is_column, other=0.0)[None, :]
            out = narrow + rows[:, None] * narrow_stride + columns[None, :]
            tl.store(out, acc.to(narrow.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _expand_tiles(
    narrow, anchor, y, rows_at, count, places, blocks, capacity, num_blocks, narrow_stride, y_stride,
    PROGRAMS: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    layer, first = tl.load(blocks + block), tl.load(blocks + num_blocks + block)
    width, start_of_layer = tl.load(blocks + 2 * num_blocks + block), tl.load(blocks + 3 * num_blocks + block)
    if ALIGNED:
        width, start_of_layer = tl.multiple_of(width, 8), tl.multiple_of(start_of_layer, 8)
    ws = tl.multiple_of(first, BW) + tl.arange(0, BW)
    is_w = ws < width
    for tile in range(tl.program_id(0), tl.load(count), PROGRAMS):
        rank = tl.load(places + tile).to(tl.int32)
        if rank > 0:
            if ALIGNED:
                rank = tl.multiple_of(rank, 8)
            rows = tl.load(rows_at + tile * BT + tl.arange(0, BT)).to(tl.int64)
            is_row = rows >= 0
            matrix = anchor + tl.load(places + (2 + layer) * capacity + tile) * UNIT
            acc = tl.zeros((BT, BW), tl.float32)
            for start in range(0, rank, BN):
                columns = start + tl.arange(0, BN)
                is_column = columns < rank
                u_TN = tl.load(
                    narrow + rows[:, None] * narrow_stride + layer * rank + columns[None, :],
                    mask=is_row[:, None] & is_column[None, :],
                    other=0.0,
                )
                b_WN = tl.load(
                    matrix + ws[:, None] * rank + columns[None, :],
                    mask=is_w[:, None] & is_column[None, :],
                    other=0.0,
                )
                acc = dot(u_TN, tl.trans(b_WN), acc, PRECISION)
            out = y + rows[:, None] * y_stride + start_of_layer + ws[None, :]
            is_cell = is_row[:, None] & is_w[None, :]
            base_TW = tl.load(out, mask=is_cell, other=0.0).to(tl.float32)
            tl.store(out, (base_TW + acc).to(y.dtype.element_ty), mask=is_cell)
