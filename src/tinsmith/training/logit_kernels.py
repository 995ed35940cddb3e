"""Logsumexp and gradient of a chunk's logits, each in one reading of them: Triton kernels for NVIDIA GPUs.

Other fused heads (Liger's among them) make the gradient of a mean cross entropy and know no coefficients of single
tokens, which is what every loss here comes down to. The plain reference is `logits.PlainLogits`. Importing this module
needs triton.
Shape letters: C rows of a chunk, M rows with a gradient, V vocabulary, F pairs of a row and a target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.training.logits import Pairs, coef_sums

BLOCK = 4096
LEAST = tl.constexpr(-1e30)  # stands for minus infinity, whose difference with itself is not a number


@triton.jit
def _logsumexp(logits, out, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    row_at = logits + row.to(tl.int64) * stride
    top = tl.full((BLOCK,), LEAST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row_at + columns, mask=columns < width, other=LEAST)
        new = tl.maximum(top, x)
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
    most = tl.max(top, 0)
    tl.store(out + row, most + tl.log(tl.sum(total * tl.exp(top - most), 0)))


@triton.jit
def _gradient(logits, lse, sums, first, targets, coefs, rows, out, width, stride, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    row = tl.load(rows + index)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < width
    x = tl.load(logits + row * stride + columns, mask=is_there, other=0.0)
    grad = -tl.load(sums + row) * tl.exp(x - tl.load(lse + row))
    for pair in range(tl.load(first + row), tl.load(first + row + 1)):
        grad += tl.where(columns == tl.load(targets + pair), tl.load(coefs + pair), 0.0)
    tl.store(out + index.to(tl.int64) * width + columns, grad.to(out.dtype.element_ty), mask=is_there)


class FusedLogits:
    """See `logits.LogitOps`."""

    def logsumexp(self, logits_CV: Tensor) -> Tensor:
        num, width = logits_CV.shape
        lse_C = torch.empty(num, device=logits_CV.device)
        _logsumexp[(num,)](logits_CV, lse_C, width, logits_CV.stride(0), BLOCK=BLOCK, num_warps=8)
        return lse_C

    def gradient(
        self, logits_CV: Tensor, lse_C: Tensor, pairs: Pairs, coef_F: Tensor, rows_M: Tensor, dtype: torch.dtype
    ) -> Tensor:
        width = logits_CV.shape[1]
        grad_MV = torch.empty(len(rows_M), width, dtype=dtype, device=logits_CV.device)
        sums_C = coef_sums(pairs, coef_F)
        _gradient[(len(rows_M), triton.cdiv(width, BLOCK))](
            logits_CV, lse_C, sums_C, pairs.first_C, pairs.target_F, coef_F, rows_M, grad_MV, width,
            logits_CV.stride(0), BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        return grad_MV
