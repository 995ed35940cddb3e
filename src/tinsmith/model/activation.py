"""SiLU whose bits don't depend on where an element lies in its array.

torch's own rounds the last elements of each thread's share in scalar code, differently from the rest, and where shares
end depends on how many rows a pass has (measured from 3 threads up). Here the only inexact function is exp, whose
kernel has no such tail; sums, products and quotients round the same everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation


class StableSiLU(nn.Module):
    """x · sigmoid(x), for arrays of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _sigmoid(x).mul_(x)
        y: Tensor = _SiLU.apply(x)  # type: ignore[no-untyped-call]
        return y


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _sigmoid(x).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """dx = dy · s · (1 + x · (1 - s)) with s = sigmoid(x)."""
        (x,) = ctx.saved_tensors
        s = _sigmoid(x)
        return torch.rsub(s, 1.0).mul_(x).add_(1.0).mul_(s).mul_(grad)


def _sigmoid(x: Tensor) -> Tensor:
    return torch.neg(x).exp_().add_(1.0).reciprocal_()


def replace_silu(model: nn.Module) -> None:
    """Put StableSiLU wherever the model holds a SiLU module."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.SiLU, SiLUActivation)):
            model.set_submodule(name, StableSiLU())
