"""A weight that is never trained, laid out for the products that a pass makes with it.

On x86 processors a float32 weight is kept in oneDNN's own layout, for the side that it is multiplied from, and from the
first backward pass on for the other side too. A product is faster than on the plain layout, most so with few rows
(dev/LOG.md), and each row has the same bits for any number of rows from two up; the plain weight is given up.
Elsewhere products are torch's own. A weight in fewer bits (`model.stored`) stays as it is, and each product dequantises
some rows of it at a time, so that both sides see the very same values.
Shape letters: T rows of the pass, I inputs, O outputs.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model.stored import Stored

PACK_ROWS = 256  # a hint for the layout; other numbers of rows are as fast with it
X86 = ("x86_64", "AMD64")
EVEN_ROWS = 16  # from so many rows up, torch's own products of float32 give a row the same bits
TILE_NUMBERS = 2**20  # dequantised at a time on a CPU: 4 MiB, about what a core's cache holds
DEVICE_TILE_NUMBERS = 2**25


class FrozenMatrix:
    """W [O, I] with its products from both sides. Not thread-safe."""

    def __init__(self, *parts_OI: Tensor) -> None:
        """parts_OI: weights with the same inputs, whose outputs lie side by side."""
        parts = [part.detach() for part in parts_OI]
        self.out_features, self.in_features = sum(len(part) for part in parts), parts[0].shape[1]
        self.dtype = parts[0].dtype
        self.device = parts[0].device
        self._tiles: tuple[Tensor, ...] = ()
        self._weight_OI: Tensor | None = None
        self._packed: Tensor | None = None
        self._packed_transpose: Tensor | None = None
        if any(isinstance(part, Stored) for part in parts):
            self._tiles = tuple(tile for part in parts for tile in _tiles(part))
            return
        weight_OI = parts[0] if len(parts) == 1 else torch.cat(parts)
        if can_pack(weight_OI):
            self._packed = _pack(weight_OI)
        else:
            self._weight_OI = weight_OI

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    @property
    def form(self) -> str:
        """How most of it is kept: the name of a form, or of a dtype."""
        forms = [tile.form.value for tile in self._tiles if isinstance(tile, Stored)]
        return forms[0] if forms else str(self.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        """What is held of it now."""
        if self._tiles:
            return sum(t.num_bytes if isinstance(t, Stored) else t.nbytes for t in self._tiles)
        copies = (self._packed is not None) + (self._packed_transpose is not None) or 1
        return copies * self.out_features * self.in_features * self.dtype.itemsize

    def times(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x Wᵀ + b, a new tensor [T, O]."""
        if self._tiles:
            y_TO = self._times_tiles(x_TI, self.dtype)
            return y_TO if bias_O is None else y_TO.add_(bias_O)
        if self._packed is None:
            return F.linear(x_TI, cast(Tensor, self._weight_OI), bias_O)
        return _multiply(x_TI, self._packed, bias_O)

    def times_float32(self, x_TI: Tensor) -> Tensor:
        """x Wᵀ added up and kept in float32, a new tensor [T, O], whatever W's dtype is."""
        if self.dtype == torch.float32:
            return self.times(x_TI)
        if self._tiles:
            return self._times_tiles(x_TI.float(), torch.float32)
        weight_OI = cast(Tensor, self._weight_OI)
        if self.device.type == "cuda":
            return torch.mm(x_TI, weight_OI.T, out_dtype=torch.float32)
        return x_TI.float() @ weight_OI.float().T

    def times_transpose(self, y_TO: Tensor) -> Tensor:
        """y W, a new tensor [T, I]."""
        if self._tiles:
            return self._times_transposed_tiles(y_TO)
        if self._packed is None:
            return y_TO @ cast(Tensor, self._weight_OI)
        if self._packed_transpose is None:
            self._packed_transpose = _pack(self._packed.to_dense().T.contiguous())
        return _multiply(y_TO, self._packed_transpose, None)

    @torch.no_grad()
    def _times_tiles(self, x_TI: Tensor, dtype: torch.dtype) -> Tensor:
        rows_TI = _even(x_TI)
        y_TO = rows_TI.new_empty(len(rows_TI), self.out_features)
        at = 0
        for tile in self._tiles:
            torch.mm(rows_TI, plain_values(tile).to(dtype).T, out=y_TO[:, at : at + len(tile)])
            at += len(tile)
        return y_TO[: len(x_TI)]

    @torch.no_grad()
    def _times_transposed_tiles(self, y_TO: Tensor) -> Tensor:
        """Added up in float32, tile after tile."""
        rows_TO = _even(y_TO)
        x_TI = torch.zeros(len(rows_TO), self.in_features, device=rows_TO.device)
        at = 0
        for tile in self._tiles:
            own_TO = rows_TO[:, at : at + len(tile)]
            if self.dtype == torch.float32:
                x_TI.addmm_(own_TO, plain_values(tile))
            else:
                x_TI += own_TO @ plain_values(tile)
            at += len(tile)
        return x_TI[: len(y_TO)].to(self.dtype)


def has_packed_layout() -> bool:
    """Whether float32 weights on this machine's processor can have oneDNN's layout."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return platform.machine() in X86 and has_onednn


def can_pack(weight_OI: Tensor) -> bool:
    """Whether oneDNN's layout is there for this weight."""
    is_plain = not isinstance(weight_OI, Stored) and weight_OI.dtype == torch.float32
    return is_plain and weight_OI.device.type == "cpu" and has_packed_layout()


def plain_values(weight: Tensor) -> Tensor:
    """All numbers of a weight, however it is kept."""
    return weight.dequantised() if isinstance(weight, Stored) else weight


def _tiles(part_OI: Tensor) -> Iterator[Tensor]:
    most = TILE_NUMBERS if part_OI.device.type == "cpu" else DEVICE_TILE_NUMBERS
    rows = max(1, most // part_OI.shape[1])
    for start in range(0, len(part_OI), rows):
        yield part_OI[start : start + rows]


def _even(x: Tensor) -> Tensor:
    missing = EVEN_ROWS - len(x) if x.device.type == "cpu" else 0
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def _pack(weight_OI: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS))


def _multiply(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x_TI, packed, bias_O, "none", [], ""))
