"""A weight that is never trained, laid out for the products that a pass makes with it.

On x86 processors a float32 weight is kept twice in oneDNN's own layout, once for each side it is multiplied from. A
product is faster than on the plain layout, most so with few rows (dev/LOG.md), and each row has the same bits for any
number of rows from two up. The second copy takes the plain weight's place at the first backward pass. Elsewhere
products are torch's own.
Shape letters: T rows of the pass, I inputs, O outputs.
"""

from __future__ import annotations

import platform
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_ROWS = 256  # a hint for the layout; other numbers of rows are as fast with it
X86 = ("x86_64", "AMD64")


class FrozenMatrix:
    """W [O, I] with its products from both sides. Not thread-safe."""

    def __init__(self, weight_OI: Tensor) -> None:
        weight_OI = weight_OI.detach()
        self.out_features, self.in_features = weight_OI.shape
        self.dtype = weight_OI.dtype
        self.device = weight_OI.device
        self._weight_OI: Tensor | None = weight_OI
        self._packed: Tensor | None = _pack(weight_OI) if can_pack(weight_OI) else None
        self._packed_transpose: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def times(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x Wᵀ + b, a new tensor [T, O]."""
        if self._packed is None:
            return F.linear(x_TI, cast(Tensor, self._weight_OI), bias_O)
        return _multiply(x_TI, self._packed, bias_O)

    def times_float32(self, x_TI: Tensor) -> Tensor:
        """x Wᵀ added up and kept in float32, a new tensor [T, O], whatever W's dtype is."""
        if self.dtype == torch.float32:
            return self.times(x_TI)
        weight_OI = cast(Tensor, self._weight_OI)
        if self.device.type == "cuda":
            return torch.mm(x_TI, weight_OI.T, out_dtype=torch.float32)
        return x_TI.float() @ weight_OI.float().T

    def times_transpose(self, y_TO: Tensor) -> Tensor:
        """y W, a new tensor [T, I]."""
        if self._packed is None:
            return y_TO @ cast(Tensor, self._weight_OI)
        if self._packed_transpose is None:
            self._packed_transpose = _pack(cast(Tensor, self._weight_OI).T.contiguous())
            self._weight_OI = None
        return _multiply(y_TO, self._packed_transpose, None)


def has_packed_layout() -> bool:
    """Whether float32 weights on this machine's processor can have oneDNN's layout."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return platform.machine() in X86 and has_onednn


def can_pack(weight_OI: Tensor) -> bool:
    """Whether oneDNN's layout is there for this weight."""
    return weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and has_packed_layout()


def _pack(weight_OI: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS))


def _multiply(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x_TI, packed, bias_O, "none", [], ""))
