"""The machine under test keeps the rule of rows, and the probe sees a breach of it."""

import pytest
import torch

from tinsmith.model import FrozenMatrix, row_probe


def test_products_of_the_bases_are_even_here(base, wide_base, threads):
    assert row_probe.uneven_products([*base.matrices(), *wide_base.matrices()]) == []


@pytest.mark.parametrize("side", ["times", "times_transpose"])
def test_a_breach_is_seen(side: str, monkeypatch: pytest.MonkeyPatch):
    product = getattr(FrozenMatrix, side)

    def split_by_rows(matrix, rows):
        return product(matrix, rows) if len(rows) > 64 else product(matrix, rows) * (1 + 1e-6)

    monkeypatch.setattr(FrozenMatrix, side, split_by_rows)
    matrices = [FrozenMatrix(torch.randn(48, 200)), FrozenMatrix(torch.randn(32, 96))]
    assert row_probe.uneven_products(matrices) == [(48, 200), (32, 96)]
