"""RMSNorm as one autograd node that keeps its input and one number a row. arXiv 1910.07467, equation 4.

Shape letters: ... leading dimensions, D the normed one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x · r · w with r = (mean(x²) + eps)^-½; float32 inside, whatever the dtype of x."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        super().__init__()
        self.weight_D = weight_D.detach()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _norm(x, self.weight_D, self.eps)[0]
        return cast(Tensor, _RMSNorm.apply(x, self.weight_D, self.eps))  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, r = _norm(x, weight_D, eps)
        ctx.save_for_backward(x, r)
        ctx.weight_D = weight_D
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """dx = r · g - x · r³ · mean(g · x) with g = dy · w."""
        x, r = ctx.saved_tensors
        g = torch.mul(grad.float(), ctx.weight_D)
        share = torch.mul(g, x).mean(-1, keepdim=True).mul_(r).mul_(r).mul_(r)
        return g.mul_(r).addcmul_(x, share, value=-1.0).to(x.dtype), None, None


def _norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and r [..., 1]."""
    full = x.float()
    r = torch.mul(full, full).mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = torch.mul(full, r)
    return (y.mul_(weight_D) if x.dtype == torch.float32 else weight_D * y.to(x.dtype)), r
