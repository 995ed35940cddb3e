"""SiLU, alone and times its gate, and the gate of gpt-oss, in torch's own kernels or with bits that don't depend on an
element's place.

torch's kernel rounds the last elements of each thread's share in scalar code, differently from the rest, and where
shares end depends on how many rows a pass has. The stable form costs more: its only inexact function is exp, whose
kernel has no such tail; sums, products and quotients round the same everywhere.
Shape letters: B rows of a block, I inner size of an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

BLOCK_ROWS = 128


class StableSiLU(nn.Module):
    """x · sigmoid(x), for arrays of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return stable_silu(x)
        y: Tensor = _SiLU.apply(x)  # type: ignore[no-untyped-call]
        return y


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return stable_silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return stable_silu_grad(x).mul_(grad)


def stable_sigmoid(x: Tensor) -> Tensor:
    """Differentiable; the bits of an element don't depend on its place."""
    return cast(Tensor, _Sigmoid.apply(x)) if torch.is_grad_enabled() else _sigmoid(x)  # type: ignore[no-untyped-call]


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = _sigmoid(x)
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (s,) = ctx.saved_tensors
        return torch.rsub(s, 1.0).mul_(s).mul_(grad)


def gated_silu(gate_up: Tensor, *, stable: bool) -> Tensor:
    """silu(gate) · up of [..., 2I], whose last dimension holds gate and then up; [..., I]. Keeps its input alone."""
    if not torch.is_grad_enabled():
        return _gated(gate_up, stable)
    return cast(Tensor, _GatedSiLU.apply(gate_up, stable))  # type: ignore[no-untyped-call]


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, stable: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.stable = stable
        return _gated(gate_up, stable)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """dup = dy · silu(gate), dgate = dy · up · silu'(gate)."""
        (gate_up,) = ctx.saved_tensors
        out = gate_up.new_empty(gate_up.shape)
        for gate_up_B, grad_B, out_B in zip(*map(_row_blocks, (gate_up, grad, out)), strict=True):
            gate, up = gate_up_B.chunk(2, -1)
            dgate, dup = out_B.chunk(2, -1)
            if ctx.stable:
                s = _sigmoid(gate)
                inner = torch.mul(gate, s)
                torch.mul(grad_B, inner, out=dup)
                slope = torch.rsub(s, 1.0).mul_(inner).add_(s)  # silu' = s + silu · (1 - s)
                torch.mul(slope.mul_(grad_B), up, out=dgate)
            else:
                inner = F.silu(gate)
                torch.mul(grad_B, inner, out=dup)
                torch.mul(grad_B, up, out=inner)
                torch.ops.aten.silu_backward.grad_input(inner, gate, grad_input=dgate)
        return out, None


def _gated(gate_up: Tensor, stable: bool) -> Tensor:
    *leading, width = gate_up.shape
    out = gate_up.new_empty(*leading, width // 2)
    for gate_up_B, out_B in zip(_row_blocks(gate_up), _row_blocks(out), strict=True):
        gate, up = gate_up_B.chunk(2, -1)
        torch.mul(stable_silu(gate) if stable else F.silu(gate), up, out=out_B)
    return out


def _row_blocks(x: Tensor) -> Sequence[Tensor]:
    """Views of [..., W] as rows, few enough that what is made of them stays in the caches of a CPU's cores."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows,) if x.device.type != "cpu" else torch.split(rows, BLOCK_ROWS * torch.get_num_threads())


def stable_silu(x: Tensor) -> Tensor:
    return _sigmoid(x).mul_(x)


def stable_silu_grad(x: Tensor) -> Tensor:
    """s · (1 + x · (1 - s)) with s = sigmoid(x)."""
    s = _sigmoid(x)
    return torch.rsub(s, 1.0).mul_(x).add_(1.0).mul_(s)


def _sigmoid(x: Tensor) -> Tensor:
    return torch.neg(x).exp_().add_(1.0).reciprocal_()


def replace_silu(model: nn.Module) -> None:
    """Put StableSiLU wherever the model holds a SiLU module."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.SiLU, SiLUActivation)):
            model.set_submodule(name, StableSiLU())


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """(u + 1) · g · sigmoid(alpha · g) of [..., 2I], gate and then up, with g = min(gate, limit) and u = up clamped to
    ±limit; [..., I]. gpt-oss, arXiv 2508.10925, section 2.2. Bits don't depend on an element's place."""
    if not torch.is_grad_enabled():
        return _clamped(gate_up, alpha, limit)[0]
    return cast(Tensor, _ClampedSwiGLU.apply(gate_up, alpha, limit))  # type: ignore[no-untyped-call]


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.bounds = alpha, limit
        return _clamped(gate_up, alpha, limit)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """dup = dy · g s and dgate = dy · (u + 1) · s · (1 + alpha · g · (1 - s)), with s the sigmoid; both are zero
        where the clamp holds."""
        (gate_up,) = ctx.saved_tensors
        alpha, limit = ctx.bounds
        gate, up = gate_up.chunk(2, -1)
        _, g, u1, s = _clamped(gate_up, alpha, limit)
        dup = torch.mul(grad, g).mul_(s).masked_fill_(up.abs() > limit, 0.0)
        slope = torch.rsub(s, 1.0).mul_(g).mul_(alpha).add_(1.0).mul_(s)
        dgate = slope.mul_(u1).mul_(grad).masked_fill_(gate > limit, 0.0)
        return torch.cat([dgate, dup], -1), None, None


def _clamped(gate_up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, g, u + 1 and the sigmoid."""
    gate, up = gate_up.chunk(2, -1)
    g, u1 = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1.0)
    s = _sigmoid(torch.mul(g, alpha))
    return torch.mul(g, s).mul_(u1), g, u1, s
