"""The product of two blocks as the LoRA kernels make it: float32 sums, whatever its inputs are."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BY_HAND = tl.constexpr("bfloat16 as float32")  # triton's interpreter takes bfloat16 for integers (seen in 3.7.1)


def precision_of(x: Tensor) -> Any:
    """What `dot` takes as PRECISION for inputs like this: float32 is never shortened."""
    if x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return BY_HAND.value
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == BY_HAND:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee" if PRECISION == BY_HAND else PRECISION)
