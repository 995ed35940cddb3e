"""The machine under test keeps the rule of rows, and the probe sees a breach of it."""

import pytest
import torch
import torch.nn.functional as F

from tinsmith.model import row_probe


def test_products_of_the_bases_are_even_here(base, wide_base, threads):
    assert row_probe.uneven_products([*base.weights(), *wide_base.weights()]) == []


def test_a_breach_is_seen(monkeypatch: pytest.MonkeyPatch):
    def split_by_rows(x, w):
        return F.linear(x, w) if len(x) > 64 else F.linear(x, w) * (1 + 1e-6)

    weights = [torch.randn(48, 200), torch.randn(32, 96)]
    monkeypatch.setattr(row_probe, "F", type("F", (), {"linear": staticmethod(split_by_rows)}))
    assert row_probe.uneven_products(weights) == [(48, 200), (32, 96)]
