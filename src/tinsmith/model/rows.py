"""How many rows a product has to have so that the bits of each don't depend on their number."""

from __future__ import annotations

from tinsmith.model.frozen import has_packed_layout

# Rows of a float32 product on oneDNN's layout are bitwise equal for any number of rows from 2 up, on the plain layout
# from 12 up (measured); fewer take other kernels. The grid keeps the flat length of [T, width] arrays a multiple of the
# vector width, so that elementwise kernels never reach their scalar tail, which rounds exp and the like differently; it
# widens with the number of rows, since oneDNN prepares a kernel for each number of rows that it meets (up to 3 ms, kept
# for the next time), and rows that nobody asked for cost as much as others.
MIN_ROWS = 4 if has_packed_layout() else 16
ROW_GRID = 4
GRID_SHARE = 128


def padded_rows(num_rows: int) -> int:
    """The number of rows that a pass of `num_rows` real rows must have, so that its bits don't depend on its size.

    A multiple of ROW_GRID, and of the largest power of two that is at most 1/GRID_SHARE of the rows.
    """
    grid = max(ROW_GRID, (1 << (num_rows // GRID_SHARE).bit_length()) >> 1)
    return max(MIN_ROWS, -(-num_rows // grid) * grid)
