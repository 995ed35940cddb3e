"""The elementwise parts of a layer, each beside its plain formula in float64, forward and backward; and their bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model import activation
from tinsmith.model.activation import gated_silu
from tinsmith.model.norm import RMSNorm
from tinsmith.model.rotary import rotate

ROWS, HEADS, SIZE = 52, 3, 32
WEIGHT = torch.rand(SIZE, generator=torch.Generator().manual_seed(5)) + 0.5
ANGLES = torch.rand(ROWS, SIZE // 2, generator=torch.Generator().manual_seed(6)).repeat(1, 2) * 6
COS, SIN = ANGLES.cos(), ANGLES.sin()


def plain_norm(x: Tensor) -> Tensor:
    return WEIGHT * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def plain_rotary(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * COS[:, None] + torch.cat([-x2, x1], -1) * SIN[:, None]


def plain_gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


CASES = {
    "norm": (RMSNorm(WEIGHT, 1e-6), plain_norm),
    "rotary": (lambda x: rotate(x, COS, SIN), plain_rotary),
    "gated": (lambda x: gated_silu(x, stable=False), plain_gated),
    "stable": (lambda x: gated_silu(x, stable=True), plain_gated),
}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("ours", "plain"), CASES.values(), ids=CASES)
def test_value_and_gradient(ours, plain, strided):
    torch.manual_seed(0)
    x = torch.randn(ROWS, 2 * HEADS, SIZE)[:, :HEADS] if strided else torch.randn(ROWS, HEADS, SIZE)
    x[0, 0] = 0
    x[1, 0, :4] = 80.0
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    taken = leaf.expand(2, *leaf.shape)[1] if strided else leaf
    y, want = ours(taken), plain(exact)
    dy = torch.randn(y.shape)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    (want_dx,) = torch.autograd.grad(want, exact, dy.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(dx.double(), want_dx, rtol=1e-5, atol=2e-5 * float(want_dx.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["norm", "rotary", "stable"])
def test_a_row_has_the_same_bits_among_any_others(name, threads):
    """Of [rows, 3, 32], for numbers of rows as passes have them, split over threads."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(2000, HEADS, SIZE, generator=generator) for _ in range(2))
    cos, sin = torch.randn(2, 2000, SIZE, generator=generator)
    ours = (lambda rows: rotate(rows, cos[: len(rows)], sin[: len(rows)])) if name == "rotary" else CASES[name][0]

    def both(rows: int) -> tuple[Tensor, Tensor]:
        leaf = x[:rows].clone().requires_grad_()
        y = ours(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, dy[:rows, :, : y.shape[2]])[0]

    whole = both(2000)
    for rows in (4, 16, 20, 52, 700, 1996):
        for part, all_rows in zip(both(rows), whole, strict=True):
            assert torch.equal(part, all_rows[:rows])


@pytest.mark.parametrize("stable", [False, True])
def test_gated_silu_of_many_blocks(stable, monkeypatch):
    """Rows that don't fill the last block; the plain function in float64 is the reference."""
    monkeypatch.setattr(activation, "BLOCK_ROWS", 4)
    x = torch.randn(2, 43, 64, generator=torch.Generator().manual_seed(2))
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want = gated_silu(leaf, stable=stable), plain_gated(exact)
    (dx,), (want_dx,) = (torch.autograd.grad(out.square().sum(), one) for out, one in ((y, leaf), (want, exact)))
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(dx.double(), want_dx, rtol=1e-5, atol=1e-5)
