"""The LoRA of a decode batch on the CPU, by a small C program: adapters are read where they lie, once a step.

`compiled_kernel.c` has the arithmetic. Here are the tables by which it finds rows and matrices; who is in the batch
changes them, and nothing else. The plain reference is `lora.DecodeLora`, which also serves where the program can't be
had; the log says so then.
What stays true: a row's bits depend on its own adapter and its own input alone. Rows without adapter are not touched.
Shape letters: S adapters of the batch, N rows that have one, G groups of layers, L layers of a group at most, K rows
of A of a group, I inputs, O outputs of a group.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import LinearInfo
from tinsmith.model.compiled import Program
from tinsmith.model.lora import LoraWeights
from tinsmith.model.lora.segments import add_adapter
from tinsmith.sampling.lora import Adapter
from tinsmith.sampling.tiled_lora import Table, TileGroup, groups_of

LANES = 8
MOST_SOLE_ROWS = 32  # of one adapter alone; beyond it torch's products are as fast
MAX_ERROR = 1e-5

Kernel = Callable[..., None]


@dataclass(frozen=True, slots=True)
class _Batch:
    """adapters: kept, since tables have their addresses. tables: places, int64 [S, G, 2 + L]: the rank, 0 where the
    adapter has no matrices in the group; the addresses of A and of each B; scales, float32 [S, G, L]; starts, int32
    [S + 1]: the first of each adapter's rows; rows, int32 [N]; u, float32 [N, K], K rounded up to whole vectors.
    arguments: what the program is told of them, by group."""

    adapters: tuple[Adapter, ...]
    tables: tuple[Table, ...]
    arguments: Mapping[str, tuple[int, ...]]


class CompiledLora:
    """See `RowLora`, in float32."""

    def __init__(self, kernel: Kernel, groups: Mapping[str, TileGroup], num_threads: int, *, is_exact: bool) -> None:
        """groups: numbered by `index` from 0. is_exact: a row's bits don't depend on the others."""
        self._kernel = kernel
        self._groups = groups
        self._widths = {name: np.array(group.widths, np.int32) for name, group in groups.items()}
        self._num_layers = max(len(group.widths) for group in groups.values())
        self._num_threads = num_threads
        self._is_exact = is_exact
        self._sole: tuple[Adapter, int] | None = None  # the adapter of all rows, and their number
        self._places: WeakKeyDictionary[Adapter, tuple[Table, Table]] = WeakKeyDictionary()
        self._batch: _Batch | None = None

    def arrange(self, adapters_B: Sequence[Adapter | None]) -> None:
        """Take a new batch: the adapter of each row. Rows past the end are padding."""
        rows: dict[Adapter, list[int]] = {}
        for row, adapter in enumerate(adapters_B):
            if adapter is not None:
                rows.setdefault(adapter, []).append(row)
        for adapter in rows:
            if adapter not in self._places:
                self._places[adapter] = self._place(adapter)
        num = len(adapters_B)
        is_sole = len(rows) == 1 and num > MOST_SOLE_ROWS and None not in adapters_B and not self._is_exact
        self._sole = (next(iter(rows)), num) if is_sole else None
        self._batch = self._laid_out(rows) if rows and not is_sole else None

    def add(self, name: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """y += the adapters' part, in place, on the rows they serve."""
        if self._sole is not None:
            adapter, num = self._sole
            adapter.add(name, x_TI[:num], y_TO[:num])
            return
        arguments = None if self._batch is None else self._batch.arguments.get(name)
        if arguments is None:
            return
        assert x_TI.dtype == y_TO.dtype == torch.float32, "made for a base that computes in float32"
        assert x_TI.stride(1) == y_TO.stride(1) == 1, "rows lie in one piece"
        self._kernel(*arguments, x_TI.data_ptr(), x_TI.stride(0), y_TO.data_ptr(), y_TO.stride(0))

    def _place(self, adapter: Adapter) -> tuple[Table, Table]:
        """What the tables say of an adapter: places, int64 [G, 2 + L], and scales, float32 [G, L]."""
        places = np.zeros((len(self._groups), 2 + self._num_layers), np.int64)
        scales = np.zeros((len(self._groups), self._num_layers), np.float32)
        for name, weights in adapter.matrices.items():
            index = self._groups[name].index
            assert all(matrix.is_contiguous() for matrix in weights.tensors), "matrices are views of one row"
            places[index, : 1 + len(weights.tensors)] = (weights.rank, *(m.data_ptr() for m in weights.tensors))
            scales[index, : len(weights.scales)] = weights.scales
        return places, scales

    def _laid_out(self, rows: Mapping[Adapter, Sequence[int]]) -> _Batch:
        places, scales = (np.stack([self._places[a][part] for a in rows]) for part in (0, 1))
        starts = np.cumsum([0, *(len(own) for own in rows.values())], dtype=np.int32)
        flat = np.concatenate([np.array(own, np.int32) for own in rows.values()])
        most_k = -(-self._num_layers * max(adapter.rank for adapter in rows) // LANES) * LANES
        u = np.empty((len(flat), most_k), np.float32)
        tables = (places, scales, starts, flat, u)
        at_places, at_scales, at_starts, at_rows, at_u = (table.ctypes.data for table in tables)
        arguments = {
            name: (
                len(rows), len(group.widths), group.inputs, self._widths[name].ctypes.data,
                at_places + group.index * places.strides[1], places.strides[0] // places.itemsize,
                at_scales + group.index * scales.strides[1], scales.strides[0] // scales.itemsize,
                at_starts, at_rows, at_u, most_k, self._num_threads,
            )
            for name, group in self._groups.items()
        }  # fmt: skip
        return _Batch((*rows,), tables, arguments)


def compiled_lora_for(linears: Sequence[LinearInfo], *, is_exact: bool) -> CompiledLora | None:
    """None where the program can't be had."""
    kernel = PROGRAM.kernel
    return (
        None if kernel is None else CompiledLora(kernel, groups_of(linears), torch.get_num_threads(), is_exact=is_exact)
    )


def _declared(library: ctypes.CDLL) -> Kernel:
    kernel: Kernel = library.add_adapters
    number, address, stride = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    kernel.restype = None  # type: ignore[attr-defined]
    kernel.argtypes = [  # type: ignore[attr-defined]
        number, number, number, address, address, stride, address, stride, address, address, address, stride, number,
        address, stride, address, stride,
    ]  # fmt: skip
    return kernel


@torch.inference_mode()
def agrees(kernel: Kernel) -> bool:
    """Whether a few rows of two adapters get the numbers of torch's products, and each the bits that it gets alone."""
    generator = torch.Generator().manual_seed(0)
    group = TileGroup(0, 40, (19, 8))
    adapters = [_drawn(group, rank, generator) for rank in (5, 16)]
    x_TI, y_TO = (torch.randn(3, width, generator=generator) for width in (group.inputs, sum(group.widths)))
    owners = [adapters[0], adapters[1], adapters[0]]
    lora = CompiledLora(kernel, {"group": group}, torch.get_num_threads(), is_exact=True)
    lora.arrange(owners)
    found_TO = y_TO.clone()
    lora.add("group", x_TI, found_TO)
    for row, owner in enumerate(owners):
        own, alone_1O, right_1O = slice(row, row + 1), y_TO[row : row + 1].clone(), y_TO[row : row + 1].clone()
        lora.arrange([owner])
        lora.add("group", x_TI[own], alone_1O)
        add_adapter(owner.matrices["group"], x_TI[own], right_1O)
        if (
            not torch.equal(alone_1O, found_TO[own])
            or (alone_1O - right_1O).abs().max() > MAX_ERROR * right_1O.abs().max()
        ):
            return False
    return True


def _drawn(group: TileGroup, rank: int, generator: torch.Generator) -> Adapter:
    a_KI = torch.randn(len(group.widths) * rank, group.inputs, generator=generator)
    bs = tuple(torch.randn(width, rank, generator=generator) for width in group.widths)
    return Adapter.holding({"group": LoraWeights(a_KI, bs, (0.5, 2.0))}, {})


PROGRAM = Program(
    Path(__file__).with_name("compiled_kernel.c"),
    _declared,
    agrees,
    "adapters of sampled rows go through torch's batched products, which take 1.4 times as long",
)
