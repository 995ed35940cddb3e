"""Rows that a pass has beyond those that were asked for: few enough to cost nothing, and on a grid."""

from tinsmith.model.rows import GRID_SHARE, MIN_ROWS, ROW_GRID, padded_rows


def test_rows_are_on_the_grid_and_few_are_nobodys():
    for num in range(1, 9000, 7):
        padded = padded_rows(num)
        assert padded >= max(num, MIN_ROWS)
        assert padded % ROW_GRID == 0
        assert padded - num < max(MIN_ROWS, ROW_GRID, num / GRID_SHARE)


def test_padded_rows_need_no_more():
    for num in range(1, 9000, 7):
        assert padded_rows(padded_rows(num)) == padded_rows(num)
