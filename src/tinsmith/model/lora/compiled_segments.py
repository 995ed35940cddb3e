"""The CPU's segments by a small C program: one call forward and one backward for all segments whose matrices have the
same shapes.

`segments_kernel.c` has the arithmetic, and says what stays true of its bits. Here are the tables by which it finds rows
and matrices. The plain reference is `segments.SegmentsLora`, which also serves where the program can't be had (the log
says so then) and crowds that have a side that isn't a multiple of eight numbers.
Shape letters: S segments of a crowd, T rows of the pass, M rows of all segments, or of their live ranges, I inputs, O
outputs of a group, L layers of a group, R rank, K = L · R, C chunks of the layers' outputs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinsmith.model.compiled import Program
from tinsmith.model.lora.backend import LoraBackend, LoraWeights, Segment
from tinsmith.model.lora.segments import Crowd, SegmentsLora

WIDE, DEEP, CHUNK = 128, 72, 512  # columns and rows of a block; outputs, or inputs, of a share of the work
ROWS = 192  # of a segment, in a share of the forward pass
LANES = 8
MAX_ERROR = 1e-5

Table = NDArray[np.int64]
Function = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Kernel:
    add: Function
    add_grads: Function


class _CrowdArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_layers", "inputs", "rank", "num_threads")),
        *((name, ctypes.c_void_p) for name in ("widths", "places", "scales")),
    )


class _LiveArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "num_spans")),
        *((name, ctypes.c_void_p) for name in ("spans", "starts", "grads")),
        *(("num_output_owners", ctypes.c_int64), ("output_owners", ctypes.c_void_p)),
        *(("output_owned", ctypes.c_void_p), ("num_input_owners", ctypes.c_int64)),
        *(("input_owners", ctypes.c_void_p), ("input_owned", ctypes.c_void_p)),
    )


@dataclass(frozen=True, slots=True)
class _Spans:
    """table: of each live range its segment, number of rows, and first row in the pass, in u and among all live rows.
    starts [S + 1]: the first of each segment's."""

    table: Table
    starts: Table
    num_rows: int


class _Rows:
    """Where the rows of some segments are. blocks: of each its segment, number of rows, and first row in the pass and
    in u, which holds the segments end to end."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self.num = 0
        blocks = []
        self._in_u = []
        for index, segment in enumerate(segments):
            self._in_u.append(self.num)
            for first in range(segment.start, segment.end, ROWS):
                count = min(ROWS, segment.end - first)
                blocks.append((index, count, first, self.num))
                self.num += count
        self.blocks = np.array(blocks, np.int64).reshape(-1, 4)

    @functools.cached_property
    def spans(self) -> _Spans:
        found, starts, num = [], [0], 0
        for index, (segment, in_u) in enumerate(zip(self._segments, self._in_u, strict=True)):
            for first, end in segment.live:
                if end > first:
                    found.append((index, end - first, first, in_u + first - segment.start, num))
                    num += end - first
            starts.append(len(found))
        return _Spans(np.array(found, np.int64).reshape(-1, 5), np.array(starts, np.int64), num)


class _CompiledCrowd:
    """See `Crowd`."""

    def __init__(self, kernel: Kernel, group: str, segments: Sequence[Segment], rows: _Rows, num_threads: int) -> None:
        self.has_grads = segments[0].grads is not None
        self._kernel, self._rows, self._num_threads = kernel, rows, num_threads
        weights = [segment.weights[group] for segment in segments]
        self._grads = [segment.grads[group] for segment in segments if segment.grads is not None]
        first = weights[0]
        self._num_k, self._inputs = first.a_KI.shape
        self._widths = np.array([len(b_OR) for b_OR in first.bs], np.int64)
        self._places = np.array(_addresses(weights), np.int64)
        self._scales = np.array([own.scales for own in weights], np.float32)
        self._args = _CrowdArgs(
            len(first.bs), self._inputs, first.rank, num_threads,
            *(table.ctypes.data for table in (self._widths, self._places, self._scales)),
        )  # fmt: skip
        self._live: _Live | None = None

    def shrink(self, x_TI: Tensor) -> Tensor:
        return self._add(x_TI, None)

    def add(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return self._add(x_TI, y_TO)

    def add_grads(self, x_TI: Tensor, u_MK: Tensor, dy_TO: Tensor, dx_TI: Tensor) -> None:
        spans = self._rows.spans
        if not spans.num_rows:
            return
        if self._live is None:
            self._live = _Live(spans, _addresses(self._grads))
        chunks = int(np.sum(-(-self._widths // CHUNK)))
        g_CMR = u_MK.new_empty(chunks * spans.num_rows * self._args.rank)
        g_MK = u_MK.new_empty(spans.num_rows, self._num_k)
        room = self._room(WIDE * DEEP + CHUNK * self._num_k)
        self._kernel.add_grads(
            ctypes.byref(self._args), ctypes.byref(self._live.args), *_place(x_TI), *_place(dy_TO), *_place(dx_TI),
            *_place(u_MK), g_CMR.data_ptr(), g_MK.data_ptr(), room.ctypes.data, room.shape[1],
        )  # fmt: skip

    def _add(self, x_TI: Tensor, y_TO: Tensor | None) -> Tensor:
        u_MK = x_TI.new_empty(self._rows.num, self._num_k)
        blocks = self._rows.blocks
        room = self._room(CHUNK * self._args.rank)
        self._kernel.add(
            ctypes.byref(self._args), len(blocks), blocks.ctypes.data, *_place(x_TI),
            *((None, 0) if y_TO is None else _place(y_TO)), *_place(u_MK), room.ctypes.data, room.shape[1],
        )  # fmt: skip
        return u_MK

    def _room(self, size: int) -> NDArray[np.float32]:
        """Scratch space, whose size doesn't depend on the pass."""
        return np.empty((self._num_threads, size), np.float32)


class _Live:
    """What the program is told of a crowd's live ranges and gradients."""

    def __init__(self, spans: _Spans, places: Sequence[Sequence[int]]) -> None:
        grads = np.array(places, np.int64)
        outputs, inputs = _owners([own[1:] for own in places]), _owners([own[:1] for own in places])
        self._tables = (spans.table, spans.starts, grads, *outputs, *inputs)
        at_spans, at_starts, at_grads, *at_owners = (table.ctypes.data for table in self._tables)
        self.args = _LiveArgs(
            spans.num_rows, len(spans.table), at_spans, at_starts, at_grads,
            len(outputs[0]) - 1, *at_owners[:2], len(inputs[0]) - 1, *at_owners[2:],
        )  # fmt: skip


def _owners(places: Sequence[Sequence[int]]) -> tuple[Table, Table]:
    """Segments that have gradients in the same places, as one; all of them, where only some of the places are the same.

    Returns:
        starts: the first of each owner's, and their number. owned: segments.
    """
    owners: dict[tuple[int, ...], list[int]] = {}
    for index, own in enumerate(places):
        owners.setdefault(tuple(own), []).append(index)
    if any(len(set(column)) < len(owners) for column in zip(*places, strict=True)):
        owners = {(): list(range(len(places)))}
    starts = np.cumsum([0, *map(len, owners.values())], dtype=np.int64)
    return starts, np.array([index for own in owners.values() for index in own], np.int64)


def _addresses(weights: Sequence[LoraWeights]) -> list[list[int]]:
    assert all(matrix.is_contiguous() for own in weights for matrix in own.tensors), "matrices are views of one row"
    return [[matrix.data_ptr() for matrix in own.tensors] for own in weights]


def _place(rows: Tensor) -> tuple[int, int]:
    """Address, and the step from a row to the next."""
    assert rows.dtype == torch.float32, "made for a base that computes in float32"
    assert rows.stride(1) == 1, "rows lie in one piece"
    return rows.data_ptr(), rows.stride(0)


class CompiledSegments(SegmentsLora):
    """See `LoraPass`."""

    def __init__(self, kernel: Kernel, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        self._kernel = kernel
        self._num_threads = torch.get_num_threads()
        self._tables: dict[tuple[int, ...], _Rows] = {}

    def _crowd(self, group: str, indices: tuple[int, ...]) -> Crowd:
        segments = [self._segments[index] for index in indices]
        if not _fits(segments[0].weights[group]):
            return super()._crowd(group, indices)
        if indices not in self._tables:
            self._tables[indices] = _Rows(segments)
        return _CompiledCrowd(self._kernel, group, segments, self._tables[indices], self._num_threads)


def _fits(weights: LoraWeights) -> bool:
    sides = (weights.rank, weights.a_KI.shape[1], *(len(b_OR) for b_OR in weights.bs))
    return all(side % LANES == 0 for side in sides)


def compiled_segments() -> LoraBackend | None:
    """None if the program can't be had."""
    kernel = PROGRAM.kernel
    return None if kernel is None else functools.partial(CompiledSegments, kernel)


def _declared(library: ctypes.CDLL) -> Kernel:
    count, address = ctypes.c_int64, ctypes.c_void_p
    rows = (address, count)
    add, add_grads = library.add_segments, library.add_grads
    add.restype = add_grads.restype = None
    add.argtypes = (address, count, address, *rows * 4)
    add_grads.argtypes = (address, address, *rows * 4, address, address, *rows)
    return Kernel(add, add_grads)


@torch.inference_mode()
def agrees(kernel: Kernel) -> bool:
    """Whether a few segments get the numbers of torch's products, and one of them the bits that it gets alone."""
    inputs, widths, ranges = 40, (24, 144), ((1, 14), (14, 100), (101, 103))
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def matrices(rank: int) -> LoraWeights:
        return LoraWeights(drawn(2 * rank, inputs), tuple(drawn(width, rank) for width in widths), (0.5, 2.0))

    weights = [matrices(rank) for rank in (16, 8, 16)]
    x_TI, dy_TO = drawn(104, inputs), drawn(104, sum(widths))

    def computed(backend: LoraBackend, chosen: Sequence[int]) -> list[Tensor]:
        y_TO, dx_TI = torch.ones_like(dy_TO), torch.ones_like(x_TI)
        grads = [LoraWeights(torch.ones_like(w.a_KI), tuple(map(torch.ones_like, w.bs))) for w in weights]
        segments = [
            Segment(*ranges[index], {"": weights[index]}, {"": grads[index]}, [ranges[index]]) for index in chosen
        ]
        made = backend(segments)
        made.add_grads("", x_TI, made.add("", x_TI, y_TO), dy_TO, dx_TI)
        return [y_TO, dx_TI, *(matrix for own in grads for matrix in own.tensors)]

    backend = functools.partial(CompiledSegments, kernel)
    found, right = (computed(each, range(3)) for each in (backend, SegmentsLora))
    close = all((a - b).abs().max() <= MAX_ERROR * b.abs().max() for a, b in zip(found, right, strict=True))
    rows = slice(*ranges[1])
    alone = computed(backend, [1])
    return close and torch.equal(alone[0][rows], found[0][rows]) and torch.equal(alone[1][rows], found[1][rows])


PROGRAM = Program(
    Path(__file__).with_name("segments_kernel.c"),
    _declared,
    agrees,
    "adapters in training go through torch's products, which take longer",
    (f"-DWIDE={WIDE}", f"-DDEEP={DEEP}", f"-DCHUNK={CHUNK}"),
)
