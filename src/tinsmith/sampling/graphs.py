"""CUDA graphs of decode steps: captured when a bucket of rows is first met, replayed from then on.

A step of one model is some thousand small launches, each of which costs the host more than the GPU where few sequences
are decoded; a replayed graph is one launch. A graph is kept for each bucket and each shape of the batch's adapters
(`TiledLora.key`). What stays true: a graph is replayed only while all memory that it touches lies where it lay
when it was captured, and if its first replay gave what the step gives without it; whatever can't be captured is
computed without a graph, and the log says why.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog
import torch
from torch import Tensor

from tinsmith.errors import UnsupportedError
from tinsmith.model import BaseModel
from tinsmith.model.lora.choice import has_triton
from tinsmith.sampling.blocks import num_blocks
from tinsmith.sampling.kv import KVCache
from tinsmith.sampling.layers import MAX_ERROR, LeanLayers
from tinsmith.sampling.paged import PagedKV
from tinsmith.sampling.row_lora import RowLora
from tinsmith.sampling.sequence import Sequence
from tinsmith.sampling.slot_lora import SlotShape
from tinsmith.sampling.static_step import StaticStep
from tinsmith.sampling.tiled_lora import TiledLora, TileShape
from tinsmith.types import IntArray

log = structlog.get_logger("tinsmith.worker")

SMALL_BUCKETS = (1, 2, 4)
BUCKET_GRID = 8
MAX_ROWS = 256  # a larger batch keeps the GPU busy without a graph
MAX_GRAPHS = 64
MAX_BYTES = 2 * 2**30
Key = tuple[int, tuple[TileShape, SlotShape | None]]  # rows of the bucket, shape of the adapters

WARM_UPS = 2  # kernels are compiled and workspaces taken before a capture, where neither may happen


class Captured(NamedTuple):
    """replay: do the step again. num_bytes: of the device, that the graph took."""

    replay: Callable[[], None]
    num_bytes: int


class Capture(Protocol):
    def __call__(self, step: Callable[[], None]) -> Captured:
        """Record a step, which is also run a few times. Whatever goes wrong is raised."""
        ...


class CudaCapture:
    """The CUDA side, and all of it. Graphs share a pool of memory, since never two run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Captured:
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream(self._device)
            try:
                return self._captured(step, before)
            finally:
                torch.cuda.set_stream(before)  # torch stays on the other stream where a capture can't be ended

    def _captured(self, step: Callable[[], None], before: torch.cuda.Stream) -> Captured:
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                step()
        before.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        left, _ = torch.cuda.mem_get_info(self._device)
        return Captured(graph.replay, max(0, free - left))


class DecodeGraphs:
    """num_captured: since the start. num_bytes: of the graphs that are kept."""

    def __init__(
        self, base: BaseModel, kv: PagedKV[Sequence], step: StaticStep, lora: TiledLora, capture: Capture
    ) -> None:
        self.num_captured = 0
        self._base = base
        self._kv = kv
        self._step = step
        self._lora = lora
        self._capture = capture
        self._graphs: OrderedDict[Key, Captured] = OrderedDict()
        self._addresses: tuple[int, ...] = ()
        self._version = -1
        self._is_off = False

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def num_bytes(self) -> int:
        return sum(graph.num_bytes for graph in self._graphs.values())

    def run(self, tokens: IntArray, positions: IntArray, rotary: IntArray) -> Tensor | None:
        """Hidden states of a step of all sequences in the cache, in the first rows; None where there is no graph."""
        num = len(tokens)
        if self._is_off or num > self._step.max_rows:
            return None
        if self._version != self._kv.version:
            self._arrange()
        bucket = bucket_of(num)
        self._step.load(tokens, positions, rotary, bucket)
        key = (bucket, self._lora.key)
        graph = self._graphs.get(key) or self._captured(key)
        if graph is None:
            return None
        self._graphs.move_to_end(key)
        graph.replay()
        self._base.num_forwards += 1
        return self._step.hidden_ND

    def _arrange(self) -> None:
        self._step.arrange(self._kv.tables.values())
        self._version = self._kv.version
        addresses = self._step.addresses
        if addresses != self._addresses and self._graphs:
            log.info("CUDA graphs are captured anew: memory that they use has moved", dropped=len(self._graphs))
            self._graphs.clear()
        self._addresses = addresses

    def _captured(self, key: Key) -> Captured | None:
        if self.num_bytes >= MAX_BYTES:
            return None
        bucket, (shape, _) = key
        counted, started = self._base.num_forwards, time.perf_counter()
        try:
            graph = self._capture(lambda: self._step.compute(bucket))
            self._check(graph, bucket)
        except Exception as error:
            self._is_off = True
            self._graphs.clear()
            log.warning(
                "decoding goes on without CUDA graphs, which is slower for few sequences: one could not be captured",
                rows=bucket, rank=shape.rank_class, because=f"{type(error).__name__}: {error}",
            )  # fmt: skip
            return None
        finally:
            self._base.num_forwards = counted
        self._graphs[key] = graph
        self.num_captured += 1
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        took_ms = round(1e3 * (time.perf_counter() - started))
        log.info(
            "CUDA graph captured", rows=bucket, rank=shape.rank_class, took_ms=took_ms,
            mib=round(graph.num_bytes / 2**20, 1), graphs=len(self._graphs), all_mib=round(self.num_bytes / 2**20, 1),
        )  # fmt: skip
        if self.num_bytes >= MAX_BYTES:
            log.warning(
                "no more CUDA graphs are captured: they take too much memory; other batch sizes go without",
                graphs=len(self._graphs), mib=round(self.num_bytes / 2**20),
            )  # fmt: skip
        return graph

    def _check(self, graph: Captured, bucket: int) -> None:
        """Raises: UnsupportedError: a replay gives something else than the step that was captured."""
        self._step.compute(bucket)
        expected_TD = self._step.hidden_ND[:bucket].clone()
        graph.replay()
        is_finite = expected_TD.isfinite()  # weights that diverged are their owner's affair
        error = torch.where(is_finite, self._step.hidden_ND[:bucket] - expected_TD, 0.0).abs().max()
        if not error <= MAX_ERROR[self._base.dtype] * torch.where(is_finite, expected_TD, 0.0).abs().max():
            raise UnsupportedError(f"a replay of {bucket} rows is off by {float(error):.1e}")


def bucket_of(num_rows: int) -> int:
    """The rows of the graph for a batch: 1, 2, 4, and multiples of 8."""
    for small in SMALL_BUCKETS:
        if num_rows <= small:
            return small
    return -(-num_rows // BUCKET_GRID) * BUCKET_GRID


def decode_graphs(
    base: BaseModel,
    layers: LeanLayers | None,
    kv: KVCache[Sequence] | PagedKV[Sequence],
    lora: RowLora,
    mode: str,
    capture: Capture | None = None,
) -> DecodeGraphs | None:
    """Where graphs can be had and are wanted. `mode`: see the setting `cuda_graphs`. `capture`: instead of CUDA's.

    Raises:
        UnsupportedError: the mode is `on`, and they can't be had.
    """
    if mode == "off":
        return None
    lacks = None
    if capture is None and base.device.type != "cuda":
        lacks = "the base model isn't on a GPU"
    elif capture is None and not has_triton():
        lacks = "triton is not installed"
    elif kv.states is not None:
        lacks = "its layers keep a state of each sequence"
    elif not base.has_static_experts:
        lacks = "its experts are computed one by one or from fewer bits, which a captured step can't do"
    if lacks is not None or not isinstance(kv, PagedKV) or not isinstance(lora, TiledLora):
        if mode == "on":
            raise UnsupportedError(f"--cuda-graphs on: {lacks}; start with --cuda-graphs auto")
        if base.device.type == "cuda":
            log.warning("decoding goes without CUDA graphs, which is slower for few sequences", because=lacks)
        return None
    max_blocks = min(kv.total, num_blocks(base.info.max_context)) + 1
    step = StaticStep(base, (layers or base).hidden, kv.pool, lora, MAX_ROWS, max_blocks)
    return DecodeGraphs(base, kv, step, lora, capture or CudaCapture(base.device))
