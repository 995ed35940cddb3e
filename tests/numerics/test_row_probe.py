"""The machine under test keeps the rule of rows, and the probe sees a breach of it."""

import pytest
import torch

from tinsmith import torch_engine
from tinsmith.bases.catalog import describe, parse
from tinsmith.config import Settings
from tinsmith.errors import UnsupportedError
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


def test_a_breach_is_logged_or_refused(monkeypatch: pytest.MonkeyPatch):
    info = describe(parse("tinsmith/tiny"))
    monkeypatch.setattr(torch_engine, "uneven_products", lambda matrices: [(48, 200)])
    assert torch_engine.TorchEngine(info, Settings(threads=1)).info == info
    with pytest.raises(UnsupportedError, match=r"--deterministic: .* 48 x 200 .* another number of --threads"):
        torch_engine.TorchEngine(info, Settings(threads=1, deterministic=True))


def test_deterministic_mode_starts_where_the_probe_passes():
    info = describe(parse("tinsmith/tiny"))
    torch_engine.TorchEngine(info, Settings(threads=1, deterministic=True))
