"""Weights kept in fewer bits than passes compute in: codes, and a scale for each group of a row's codes.

A `Stored` stands in the place of a weight wherever transformers' classes hold one: shape, rows, experts, transposing
and putting side by side are those of a tensor, and any other operation is made with its dequantised values. The
products of a pass dequantise a few rows of the weight at a time (see `model.frozen`).
Forms: fp8 (E4M3 and E5M2, arXiv 2209.05433), MXFP4 (E2M1 with a power of two for 32, OCP Microscaling Formats 1.0,
section 5), int4 (a group's scale and zero), NF4 (arXiv 2305.14314, section 3).
Shape letters: E experts, O outputs, I inputs, G groups of a row, B bytes of a row.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# torchao's own constants, which are those of the paper to four digits
NF4 = (
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
    0.7230, 1.0,
)  # fmt: skip
CHUNK_NUMBERS, DEVICE_CHUNK_NUMBERS = 2**20, 2**26  # on a CPU, that its caches hold; elsewhere, worth a launch


class Form(enum.Enum):
    """How a weight's numbers are coded. In four bits the first of two numbers has the low half of their byte."""

    E4M3 = "fp8"
    E5M2 = "fp8 (E5M2)"
    MXFP4 = "MXFP4"
    INT4 = "int4"
    NF4 = "NF4"

    @property
    def is_half_byte(self) -> bool:
        return self in (Form.MXFP4, Form.INT4, Form.NF4)


@cache
def table(form: Form, device: torch.device) -> Tensor:
    """The value of each byte, float32 [256]; in four bits both values, complex64 [256]: a lookup of pairs is several
    times as fast as unpacking."""
    if form in (Form.E4M3, Form.E5M2):
        dtype = torch.float8_e4m3fn if form is Form.E4M3 else torch.float8_e5m2
        return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)
    values = {
        Form.MXFP4: (*E2M1, *(-value for value in E2M1)),
        Form.INT4: (*map(float, range(8)), *map(float, range(-8, 0))),
        Form.NF4: NF4,
    }[form]
    pairs = torch.tensor([(values[byte & 15], values[byte >> 4]) for byte in range(256)])
    return torch.view_as_complex(pairs).to(device)


@cache
def powers(device: torch.device) -> Tensor:
    """2^(e - 127) for each byte e, float32 [256]; 255 is not a number."""
    exponents = torch.arange(256, dtype=torch.float64)
    return torch.where(exponents < 255, torch.exp2(exponents - 127), torch.nan).float().to(device)


def pack(codes: Tensor) -> Tensor:
    """uint8 [..., I] below 16 each, to bytes [..., I / 2]."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


class Stored(Tensor):
    """W [..., O, I], or [..., I, O] if `is_flipped`.

    codes: uint8 [..., O, B]. scales: float32 [..., O, G], or uint8, which are exponents of two with 127 added. zeros:
    int8 [..., O, G], taken from the codes' values, or None. group: inputs that share a scale; a row's last group may
    be shorter. `dtype` is what it is dequantised to, and no matter of its bits here.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    form: Form
    is_flipped: bool

    @staticmethod
    def __new__(
        cls,
        form: Form,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        group: int,
        dtype: torch.dtype = torch.float32,
        is_flipped: bool = False,
    ) -> Stored:
        *leading, outputs, num_bytes = codes.shape
        inputs = num_bytes * 2 if form.is_half_byte else num_bytes
        assert scales.shape == (*leading, outputs, -(-inputs // group)), f"{scales.shape} for {codes.shape}"
        last = (inputs, outputs) if is_flipped else (outputs, inputs)
        self = torch.Tensor._make_wrapper_subclass(cls, (*leading, *last), dtype=dtype, device=codes.device)
        self.form, self.codes, self.scales, self.zeros = form, codes, scales, zeros
        self.group, self.is_flipped = group, is_flipped
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        found = _KEEP[func](*args, **(kwargs or {})) if func in _KEEP else None
        if found is not None:
            return found
        plain_args, plain_kwargs = tree_map_only(Stored, Stored.dequantised, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Stored({self.form.value}, {list(self.shape)}, groups of {self.group})"

    @property
    def num_bytes(self) -> int:
        parts = (self.codes, self.scales, self.zeros)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantised(self) -> Tensor:
        """Its values, rounded from float32 to `dtype`; some rows at a time, which bounds what is needed beside them."""
        *leading, outputs, inputs = self._unflipped
        zeros = None if self.zeros is None else self.zeros.flatten(0, -2)
        codes, scales = self.codes.flatten(0, -2), self.scales.flatten(0, -2)
        found = torch.empty(len(codes), inputs, dtype=self.dtype, device=codes.device)
        most = CHUNK_NUMBERS if codes.device.type == "cpu" else DEVICE_CHUNK_NUMBERS
        step = max(1, most // inputs)
        for at in range(0, len(codes), step):
            rows = slice(at, at + step)
            found[rows] = _values(
                self.form, codes[rows], scales[rows], None if zeros is None else zeros[rows], self.group
            )
        whole = found.view(*leading, outputs, inputs)
        return whole.transpose(-1, -2) if self.is_flipped else whole

    @property
    def _unflipped(self) -> tuple[int, ...]:
        *leading, rows, columns = self.shape
        return (*leading, columns, rows) if self.is_flipped else (*leading, rows, columns)

    def _map(
        self, change: Callable[[Tensor], Tensor], *, dtype: torch.dtype | None = None, flips: bool = False
    ) -> Stored:
        """The same of other parts."""
        zeros = None if self.zeros is None else change(self.zeros)
        return Stored(
            self.form,
            change(self.codes),
            change(self.scales),
            zeros,
            group=self.group,
            dtype=dtype or self.dtype,
            is_flipped=self.is_flipped is not flips,
        )

    def _dim(self, dim: int) -> int | None:
        """The parts' dimension that is this one's; None for the inputs, in which they can't be cut."""
        dim %= self.ndim
        if dim < self.ndim - 2:
            return dim
        is_inputs = (dim == self.ndim - 1) is not self.is_flipped
        return None if is_inputs else self.ndim - 2


def _values(form: Form, codes_OB: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, group: int) -> Tensor:
    """float32 [O, I]."""
    looked_up = table(form, codes_OB.device).index_select(0, codes_OB.reshape(-1).int())
    values_OI = (torch.view_as_real(looked_up) if form.is_half_byte else looked_up).view(len(codes_OB), -1)
    inputs = values_OI.shape[1]
    if scales_OG.dtype == torch.uint8:
        scales_OG = powers(codes_OB.device)[scales_OG.int()]
    if inputs % group:
        assert zeros_OG is None, "groups with zeros are whole"
        return values_OI.mul_(scales_OG.repeat_interleave(group, 1)[:, :inputs])
    groups = values_OI.view(len(codes_OB), -1, group)
    if zeros_OG is not None:
        groups -= zeros_OG[..., None]
    groups *= scales_OG[..., None]
    return values_OI


def _copy(x: Stored, **options: Any) -> Stored:
    dtype, device = options.get("dtype"), options.get("device")
    return x._map(lambda part: part.to(device or part.device, copy=True), dtype=dtype)


def _flip(x: Stored, first: int = -2, second: int = -1) -> Stored | None:
    dims = {first % x.ndim, second % x.ndim}
    if len(dims) == 1:
        return x
    return x._map(lambda part: part, flips=True) if dims == {x.ndim - 2, x.ndim - 1} else None


def _permute(x: Stored, dims: Sequence[int]) -> Stored | None:
    order = [dim % x.ndim for dim in dims]
    swapped = [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2]
    return _flip(x) if order == swapped else None


def _select(x: Stored, dim: int, index: int) -> Stored | None:
    at = x._dim(dim)
    return None if at is None or at == x.ndim - 2 else x._map(lambda part: part.select(at, index))


def _slice(x: Stored, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Stored | None:
    at = x._dim(dim)
    if at is None:
        return x if (start or 0) == 0 and (end is None or end >= x.shape[dim]) and step == 1 else None
    return x._map(lambda part: torch.ops.aten.slice(part, at, start, end, step))


def _unbind(x: Stored, dim: int = 0) -> list[Stored] | None:
    at = x._dim(dim)
    if at is None or at == x.ndim - 2:
        return None
    return [x._map(lambda part, i=i: part.select(at, i)) for i in range(x.shape[dim])]  # type: ignore[misc]


def _split(x: Stored, sizes: int | Sequence[int], dim: int = 0) -> list[Stored] | None:
    if x._dim(dim) is None:
        return None
    total = x.shape[dim]
    widths = [min(sizes, total - at) for at in range(0, total, sizes)] if isinstance(sizes, int) else list(sizes)
    ends = torch.tensor(widths).cumsum(0).tolist()
    return [cast(Stored, _slice(x, dim, end - width, end)) for width, end in zip(widths, ends, strict=True)]


def _are_alike(parts: Sequence[Tensor]) -> bool:
    kinds = {
        (x.form, x.group, x.is_flipped, x.dtype, x.scales.dtype, x.zeros is None) if isinstance(x, Stored) else None
        for x in parts
    }
    return len(kinds) == 1 and None not in kinds


def _join(parts: Sequence[Tensor], dim: int, way: Callable[[list[Tensor], int], Tensor]) -> Stored:
    first = cast(Stored, parts[0])
    own = cast(Sequence[Stored], parts)
    zeros = None if first.zeros is None else way([cast(Tensor, x.zeros) for x in own], dim)
    return Stored(
        first.form,
        way([x.codes for x in own], dim),
        way([x.scales for x in own], dim),
        zeros,
        group=first.group,
        dtype=first.dtype,
        is_flipped=first.is_flipped,
    )


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Stored | None:
    at = cast(Stored, parts[0])._dim(dim) if _are_alike(parts) else None
    return None if at is None else _join(parts, at, torch.cat)


def _stack(parts: Sequence[Tensor], dim: int = 0) -> Stored | None:
    return _join(parts, 0, torch.stack) if dim == 0 and _are_alike(parts) else None


_aten = torch.ops.aten
_KEEP: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: lambda x: x._map(lambda part: part),
    _aten.alias.default: lambda x: x._map(lambda part: part),
    _aten.clone.default: lambda x, **_: x._map(torch.clone),
    _aten._to_copy.default: _copy,
    _aten.transpose.int: _flip,
    _aten.t.default: _flip,
    _aten.permute.default: _permute,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.unbind.int: _unbind,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
}
