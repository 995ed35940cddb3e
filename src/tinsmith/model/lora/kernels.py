"""Grouped LoRA on NVIDIA GPUs: three Triton kernels over the ragged segments of a pass.

    shrink   n[t, band] = scale · w[t, band] W        from wide columns to narrow ones: x Aᵀ, and dy B
    expand   w[t, band] += n[t, band] Wᵀ              from narrow to wide, into what is there: u Bᵀ, and g A
    outer    W += Σ_t w[t, band]ᵀ n[t, band]          into float32 gradients: dA, and dB

W is a matrix of the segment's own run, wherever that lies on the device (`tables.Side`). Products accumulate in
float32; float32 inputs are multiplied exactly, not as tf32. A row of `shrink` and `expand` depends on its own token
alone. `outer` adds the spans of a piece in order, starting from what the gradient holds, if no other piece adds to the
same gradient; else pieces are added as they come. Their plain reference is `loop.LoopLora`.

Importing this module needs triton, and where there is no GPU TRITON_INTERPRET=1 set before.
Shape letters: T rows of the pass, W wide columns, N narrow columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.model.lora.dot import dot, precision_of
from tinsmith.model.lora.tables import Band, Pieces, Side, Tiles, column_blocks, to_device

BLOCK_ROWS = 64
BLOCK_WIDE = 128
BLOCK_SUM = 64  # wide columns that shrink adds up at a time
MAX_BLOCK_NARROW = 128
MIN_DOT = 16  # the smallest side that tl.dot takes


@triton.jit
def _shrink(
    wide, weights, narrow, tiles, at, bands, scales, num_tiles, num_bands, wide_stride, narrow_stride,
    STRIDE_W: tl.constexpr, STRIDE_N: tl.constexpr, NUM_NARROW: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr,
    UNIT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile, band = tl.program_id(0), tl.program_id(1)
    segment = tl.load(tiles + tile)
    rows = tl.load(tiles + num_tiles + tile) + tl.arange(0, BT)
    is_row = rows < tl.load(tiles + 2 * num_tiles + tile)
    first, width, first_out = tl.load(bands + 3 * band), tl.load(bands + 3 * band + 1), tl.load(bands + 3 * band + 2)
    if ALIGNED:
        first, width, first_out = tl.multiple_of(first, 16), tl.multiple_of(width, 16), tl.multiple_of(first_out, 8)
    columns = tl.program_id(2) * BN + tl.arange(0, BN)
    is_column = columns < NUM_NARROW
    matrix = weights + tl.load(at + segment * num_bands + band) * UNIT
    wide_at = wide + rows.to(tl.int64)[:, None] * wide_stride + first
    acc = tl.zeros((BT, BN), tl.float32)
    for start in range(0, width, BW):
        ws = start + tl.arange(0, BW)
        is_w = ws < (start + BW if EVEN else width)
        x_TW = tl.load(wide_at + ws[None, :], mask=is_row[:, None] & is_w[None, :], other=0.0)
        m_WN = tl.load(
            matrix + ws[:, None] * STRIDE_W + columns[None, :] * STRIDE_N,
            mask=is_w[:, None] & is_column[None, :],
            other=0.0,
        )
        acc = dot(x_TW, m_WN, acc, PRECISION)
    layers = (first_out + columns) // RANK
    acc = acc * tl.load(scales + segment * LAYERS + layers, mask=is_column, other=0.0)[None, :]
    out = narrow + rows.to(tl.int64)[:, None] * narrow_stride + first_out + columns[None, :]
    tl.store(out, acc.to(narrow.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _expand(
    narrow, weights, wide, tiles, at, bands, blocks, num_tiles, num_bands, num_blocks, narrow_stride, wide_stride,
    STRIDE_W: tl.constexpr, STRIDE_N: tl.constexpr, NUM_NARROW: tl.constexpr,
    UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    segment = tl.load(tiles + tile)
    rows = tl.load(tiles + num_tiles + tile) + tl.arange(0, BT)
    is_row = rows < tl.load(tiles + 2 * num_tiles + tile)
    band, first_column = tl.load(blocks + block), tl.load(blocks + num_blocks + block)
    first, width, first_in = tl.load(bands + 3 * band), tl.load(bands + 3 * band + 1), tl.load(bands + 3 * band + 2)
    first_column = tl.multiple_of(first_column, BW)
    if ALIGNED:
        first, width, first_in = tl.multiple_of(first, 16), tl.multiple_of(width, 16), tl.multiple_of(first_in, 8)
    ws = first_column + tl.arange(0, BW)
    is_w = ws < width
    matrix = weights + tl.load(at + segment * num_bands + band) * UNIT
    narrow_at = narrow + rows.to(tl.int64)[:, None] * narrow_stride + first_in
    acc = tl.zeros((BT, BW), tl.float32)
    for start in range(0, NUM_NARROW, BN):
        columns = start + tl.arange(0, BN)
        is_column = columns < NUM_NARROW
        u_TN = tl.load(narrow_at + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        m_NW = tl.load(
            matrix + columns[:, None] * STRIDE_N + ws[None, :] * STRIDE_W,
            mask=is_column[:, None] & is_w[None, :],
            other=0.0,
        )
        acc = dot(u_TN, m_NW, acc, PRECISION)
    out = wide + rows.to(tl.int64)[:, None] * wide_stride + first + ws[None, :]
    is_cell = is_row[:, None] & is_w[None, :]
    base_TW = tl.load(out, mask=is_cell, other=0.0)
    tl.store(out, (base_TW.to(tl.float32) + acc).to(wide.dtype.element_ty), mask=is_cell)


@triton.jit
def _outer(
    wide, narrow, grads, pieces, spans, at, bands, blocks, num_pieces, num_spans, num_bands, num_blocks,
    wide_stride, narrow_stride,
    STRIDE_W: tl.constexpr, STRIDE_N: tl.constexpr, NUM_NARROW: tl.constexpr,
    UNIT: tl.constexpr, ALIGNED: tl.constexpr, SOLE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    piece, block = tl.program_id(0), tl.program_id(1)
    segment = tl.load(pieces + num_pieces + 1 + piece)
    band, first_column = tl.load(blocks + block), tl.load(blocks + num_blocks + block)
    first, width, first_narrow = tl.load(bands + 3 * band), tl.load(bands + 3 * band + 1), tl.load(bands + 3 * band + 2)
    first_column = tl.multiple_of(first_column, BW)
    if ALIGNED:
        first, width = tl.multiple_of(first, 16), tl.multiple_of(width, 16)
        first_narrow = tl.multiple_of(first_narrow, 8)
    ws = first_column + tl.arange(0, BW)
    columns = tl.program_id(2) * BN + tl.arange(0, BN)
    is_w, is_column = ws < width, columns < NUM_NARROW
    is_cell = is_column[:, None] & is_w[None, :]
    matrix = grads + tl.load(at + segment * num_bands + band) * UNIT
    cells = matrix + columns[:, None] * STRIDE_N + ws[None, :] * STRIDE_W
    acc = tl.zeros((BN, BW), tl.float32)
    if SOLE:
        acc = tl.load(cells, mask=is_cell, other=0.0)
    for span in range(tl.load(pieces + piece), tl.load(pieces + piece + 1)):
        end = tl.load(spans + num_spans + span)
        for start in range(tl.load(spans + span), end, BT):
            rows = start + tl.arange(0, BT)
            is_row = rows < end
            u_TN = tl.load(
                narrow + rows.to(tl.int64)[:, None] * narrow_stride + first_narrow + columns[None, :],
                mask=is_row[:, None] & is_column[None, :],
                other=0.0,
            )
            x_TW = tl.load(
                wide + rows.to(tl.int64)[:, None] * wide_stride + first + ws[None, :],
                mask=is_row[:, None] & is_w[None, :],
                other=0.0,
            )
            acc = dot(tl.trans(u_TN), x_TW, acc, PRECISION)
    if SOLE:
        tl.store(cells, acc, mask=is_cell)
    else:
        tl.atomic_add(cells, acc, mask=is_cell)


def shrink(wide_TW: Tensor, side: Side, tiles: Tiles, scales_SL: Tensor, narrow_TN: Tensor) -> None:
    """narrow = scale · wide W on the rows of the tiles; other rows are left as they are. scales_SL: float32, of each
    segment and layer; layers have equal shares of the narrow columns, one after another."""
    if not tiles.num:
        return
    block, num_layers = narrow_block(side.num_narrow), scales_SL.shape[1]
    _shrink[(tiles.num, len(side.bands), triton.cdiv(side.num_narrow, block))](
        wide_TW, side.anchor, narrow_TN, tiles.table, side.at_SL, side.bands_L, scales_SL, tiles.num, len(side.bands),
        wide_TW.stride(0), narrow_TN.stride(0),
        STRIDE_W=side.strides[0], STRIDE_N=side.strides[1], NUM_NARROW=side.num_narrow, LAYERS=num_layers,
        RANK=(side.bands[-1].narrow + side.num_narrow) // num_layers, UNIT=side.unit,
        ALIGNED=side.is_aligned, EVEN=all(band.width % BLOCK_SUM == 0 for band in side.bands),
        PRECISION=precision_of(wide_TW), BT=BLOCK_ROWS, BW=BLOCK_SUM, BN=block, num_warps=4, num_stages=3,
    )  # fmt: skip


def expand(narrow_TN: Tensor, side: Side, tiles: Tiles, wide_TW: Tensor) -> None:
    """wide += narrow Wᵀ on the rows of the tiles, in place."""
    if not tiles.num:
        return
    blocks, num_blocks = _blocks(side.bands, wide_TW.device)
    _expand[(tiles.num, num_blocks)](
        narrow_TN, side.anchor, wide_TW, tiles.table, side.at_SL, side.bands_L, blocks, tiles.num, len(side.bands),
        num_blocks, narrow_TN.stride(0), wide_TW.stride(0),
        STRIDE_W=side.strides[0], STRIDE_N=side.strides[1], NUM_NARROW=side.num_narrow, UNIT=side.unit,
        ALIGNED=side.is_aligned, PRECISION=precision_of(narrow_TN),
        BT=BLOCK_ROWS, BW=BLOCK_WIDE, BN=min(64, narrow_block(side.num_narrow)), num_warps=4, num_stages=2,
    )  # fmt: skip


def outer(wide_TW: Tensor, narrow_TN: Tensor, side: Side, pieces: Pieces) -> None:
    """W += Σ_t wideᵀ narrow over the spans of the pieces, into float32 matrices."""
    if not pieces.num:
        return
    block = min(64, narrow_block(side.num_narrow))
    blocks, num_blocks = _blocks(side.bands, wide_TW.device)
    _outer[(pieces.num, num_blocks, triton.cdiv(side.num_narrow, block))](
        wide_TW, narrow_TN, side.anchor, pieces.table, pieces.spans, side.at_SL, side.bands_L, blocks,
        pieces.num, pieces.spans.shape[1], len(side.bands), num_blocks,
        wide_TW.stride(0), narrow_TN.stride(0),
        STRIDE_W=side.strides[0], STRIDE_N=side.strides[1], NUM_NARROW=side.num_narrow, UNIT=side.unit,
        ALIGNED=side.is_aligned, SOLE=pieces.is_sole, PRECISION=precision_of(wide_TW),
        BT=BLOCK_ROWS, BW=BLOCK_WIDE, BN=block, num_warps=4, num_stages=3,
    )  # fmt: skip


def narrow_block(num_narrow: int) -> int:
    """Narrow columns that one program computes: a power of two, at least what tl.dot takes."""
    needed: int = triton.next_power_of_2(num_narrow)
    return min(MAX_BLOCK_NARROW, max(MIN_DOT, needed))


@lru_cache(maxsize=4096)
def _blocks(bands: tuple[Band, ...], device: torch.device) -> tuple[Tensor, int]:
    table = column_blocks(bands, BLOCK_WIDE)
    return to_device(table, device), table.shape[1]
