"""Rotary position embedding as one autograd node that keeps no activation. arXiv 2104.09864, equation 34, with the
halves of a head as pairs, as the weights of today's models are laid out.

Shape letters: T rows, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x · cos + (-x2, x1) · sin, where x1 and x2 are the halves of each head."""
    if not torch.is_grad_enabled():
        return _rotated(x_THD, cos_TD, sin_TD, backward=False)
    return cast(Tensor, _Rotate.apply(x_THD, cos_TD, sin_TD))  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.cos_TD, ctx.sin_TD = cos_TD, sin_TD
        return _rotated(x_THD, cos_TD, sin_TD, backward=False)

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad_THD, ctx.cos_TD, ctx.sin_TD, backward=True), None, None


def _rotated(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, backward: bool) -> Tensor:
    """The rotation, or its transpose: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; dx1 = dy1 c1 + dy2 s2, dx2 = dy2 c2 -
    dy1 s1."""
    half = x_THD.shape[-1] // 2
    x1, x2 = x_THD[..., :half], x_THD[..., half:]
    s1, s2 = sin_TD[:, None, :half], sin_TD[:, None, half:]
    y_THD = torch.mul(x_THD, cos_TD[:, None])
    y_THD[..., :half].addcmul_(x2, s2 if backward else s1, value=1.0 if backward else -1.0)
    y_THD[..., half:].addcmul_(x1, s1 if backward else s2, value=-1.0 if backward else 1.0)
    return y_THD
