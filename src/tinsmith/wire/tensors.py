"""Tensors on the wire: little-endian bytes, dense or CSR, to numpy arrays and back.

A few bytes of CSR can claim a huge dense shape, so each request has a budget of elements that decoding may spend.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tinsmith.types import FloatArray, IntArray
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.media import WireError

MAX_DENSE_ELEMENTS = 64 * 2**20  # over all tensors of one request: half a GiB of int64
MAX_DIMS = 2


class ElementBudget:
    """What one request may still densify."""

    def __init__(self, num_elements: int = MAX_DENSE_ELEMENTS) -> None:
        self._left = num_elements

    def spend(self, num_elements: int) -> None:
        """Raises: WireError: the request's tensors are larger than one request may be."""
        self._left -= num_elements
        if self._left < 0:
            raise WireError(
                f"the tensors of a request may hold at most {MAX_DENSE_ELEMENTS} elements: send fewer datums at once"
            )


def decode_tokens(data: bytes) -> npt.NDArray[np.int32]:
    """int32 [N]."""
    if len(data) % 4:
        raise WireError(f"token bytes are int32: {len(data)} bytes are not a multiple of 4")
    return np.frombuffer(data, "<i4").astype(np.int32)


def decode_tensor(tensor: pb.Tensor, name: str, budget: ElementBudget) -> IntArray | FloatArray:
    """int64 (from i64, i32) or float32 (from f32, bf16), in its shape; a missing shape means one dimension.

    Raises:
        WireError: sizes, dtype or CSR indices that don't fit together; the message names the tensor.
    """
    shape = tuple(int(size) for size in tensor.shape)
    if any(size < 0 for size in shape) or len(shape) > MAX_DIMS:
        raise WireError(f"{name}: shape {list(shape)} is not [N] or [N, K]")
    if tensor.HasField("sparse_csr"):
        return _decode_csr(tensor, shape, name, budget)
    values = _decode_values(tensor.dense, tensor.dtype, name)
    budget.spend(values.size)
    if not shape:
        return values
    if math.prod(shape) != values.size:
        raise WireError(f"{name}: {values.size} values do not fill shape {list(shape)}")
    return values.reshape(shape)


def encode_floats(values: npt.NDArray[Any]) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def encode_ids(values: npt.NDArray[Any]) -> bytes:
    return values.astype("<i4", copy=False).tobytes()


def encode_longs(values: npt.NDArray[Any]) -> bytes:
    return values.astype("<i8", copy=False).tobytes()


def _decode_values(data: bytes, dtype: int, name: str) -> IntArray | FloatArray:
    wire_dtypes: dict[int, str] = {pb.DT_F32: "<f4", pb.DT_I64: "<i8", pb.DT_I32: "<i4", pb.DT_BF16: "<u2"}
    wire_dtype = wire_dtypes.get(dtype)
    if wire_dtype is None:
        raise WireError(f"{name}: dtype {dtype} is not float32 or int64")
    if len(data) % np.dtype(wire_dtype).itemsize:
        raise WireError(f"{name}: {len(data)} bytes are no whole number of {wire_dtype[1:]} values")
    values = np.frombuffer(data, wire_dtype)
    if dtype == pb.DT_BF16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32) if dtype == pb.DT_F32 else values.astype(np.int64)


def _decode_csr(tensor: pb.Tensor, shape: tuple[int, ...], name: str, budget: ElementBudget) -> IntArray | FloatArray:
    if len(shape) != 2:
        raise WireError(f"{name}: a sparse tensor needs a shape [N, K], not {list(shape)}")
    num_rows, num_cols = shape
    budget.spend(num_rows * num_cols)
    csr = tensor.sparse_csr
    values = _decode_values(csr.values, tensor.dtype, name)
    crow = _decode_values(csr.crow_indices, pb.DT_I64, f"{name} (row pointers)")
    cols = _decode_values(csr.col_indices, pb.DT_I64, f"{name} (column indices)")
    counts = np.diff(crow)
    if crow.size != num_rows + 1 or crow[0] != 0 or crow[-1] != values.size or bool((counts < 0).any()):
        raise WireError(f"{name}: row pointers do not describe {num_rows} rows of {values.size} values")
    if cols.size != values.size or (cols.size and (int(cols.min()) < 0 or int(cols.max()) >= num_cols)):
        raise WireError(f"{name}: column indices do not lie in 0..{num_cols - 1}, one a value")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(num_rows), counts), cols] = values
    return dense
