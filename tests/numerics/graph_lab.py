"""CUDA graphs without CUDA: a step's operations are recorded on the CPU, and replayed on the very same memory.

As with CUDA, what the host decided while recording stays decided, and asking for a tensor's value is refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinsmith.model import Routes
from tinsmith.sampling.graphs import WARM_UPS, Captured
from tinsmith.sampling.slot_lora import SlotGroup, SlotLora, SlotShape, SlotTables
from tinsmith.sampling.tiled_lora import UNIT, TiledLora, TileGroup, TileShape, TileTables

WAITS = ("item", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class Recorder(TorchDispatchMode):
    """See `graphs.Capture`. num_bytes: what each graph is said to take."""

    current: Recorder | None = None

    def __init__(self, num_bytes: int = 2**20) -> None:
        super().__init__()
        self.num_bytes = num_bytes
        self.num_replays = 0
        self._calls: list[Callable[[], None]] = []

    def __call__(self, step: Callable[[], None]) -> Captured:
        for _ in range(WARM_UPS):
            step()
        self._calls = calls = []
        Recorder.current = self
        try:
            with self:
                step()
        finally:
            Recorder.current = None

        def replay() -> None:
            self.num_replays += 1
            for call in calls:
                call()

        return Captured(replay, self.num_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = kwargs or {}
        made = func(*args, **given)
        inputs = {_storage(t) for t in tree_leaves((args, given)) if isinstance(t, Tensor)}
        kept = [t for t in tree_leaves(made) if isinstance(t, Tensor)]

        def again() -> None:
            found = [t for t in tree_leaves(func(*args, **given)) if isinstance(t, Tensor)]
            for old, new in zip(kept, found, strict=True):
                if _storage(new) not in inputs:
                    old.copy_(new)

        self._calls.append(again)
        return made

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Record a kernel, which isn't an operation of torch's."""
        self._calls.append(lambda: function(*args))
        with torch.utils._python_dispatch._disable_current_modes():
            function(*args)


def _storage(tensor: Tensor) -> int:
    """Views have that of what they show; oneDNN's tensors have none."""
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def add_by_tables(tables: TileTables, group: TileGroup, shape: TileShape, x_TI: Tensor, y_TO: Tensor) -> None:
    """What the kernels do, by the same tables and addresses, in float32 on the CPU."""
    places, unit = tables.places_GLT[group.index].numpy(), UNIT if shape.is_aligned else 1
    starts = np.cumsum([0, *group.widths])
    for tile in range(int(tables.count.numpy()[0])):
        rank = int(places[0, tile])
        if not rank:
            continue
        assert rank <= shape.rank_class
        rows = [int(row) for row in tables.rows_TM.numpy()[tile] if row >= 0]
        x_NI, y_TO_host = x_TI.numpy()[rows], y_TO.numpy()
        at = [tables.anchor.data_ptr() + int(place) * unit * 4 for place in places[1:, tile]]
        a_KI = _numbers(at[0], rank * len(group.widths), group.inputs)
        scales_L = tables.scales_GLT[group.index, : len(group.widths), tile].numpy()
        u_NK = x_NI @ a_KI.T * scales_L.repeat(rank)
        for layer, width in enumerate(group.widths):
            delta = u_NK[:, layer * rank : (layer + 1) * rank] @ _numbers(at[1 + layer], width, rank).T
            y_TO_host[np.ix_(rows, range(starts[layer], starts[layer] + width))] += delta


def add_slots_by_tables(
    tables: SlotTables, group: SlotGroup, shape: SlotShape, routes: Routes, x_NI: Tensor, y_NO: Tensor
) -> None:
    """The same in experts."""
    places, unit = tables.places_GLF[group.index].numpy(), UNIT if shape.is_aligned else 1
    starts, inputs = np.cumsum([0, *group.widths]), group.inputs
    for slot, key in enumerate(routes.keys_P.numpy()):
        expert, row = divmod(int(key), len(routes.experts_TK))
        owner = int(tables.owners_B.numpy()[row])
        rank = int(places[0, owner]) if owner >= 0 else 0
        if not rank:
            continue
        assert rank <= shape.rank_class
        at = [tables.anchor.data_ptr() + int(place) * unit * 4 for place in places[1:, owner]]
        num = rank * len(group.widths)
        a_KI = _numbers(at[0] + (0 if group.shares_a else expert * num * inputs * 4), num, inputs)
        scales_L = tables.scales_GLF[group.index, : len(group.widths), owner].numpy()
        u_K = x_NI.numpy()[slot] @ a_KI.T * scales_L.repeat(rank)
        for layer, width in enumerate(group.widths):
            b_OR = _numbers(at[1 + layer] + (0 if group.shares_b else expert * width * rank * 4), width, rank)
            y_NO.numpy()[slot, starts[layer] : starts[layer] + width] += b_OR @ u_K[layer * rank : (layer + 1) * rank]


def _numbers(address: int, rows: int, columns: int) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (rows, columns))


@contextmanager
def tables_in_use(monkeypatch: Any) -> Iterator[None]:
    """Decode adapters go by the tables, in a step that is recorded and in any other."""

    def go(kernel: Callable[..., None], *args: Any) -> None:
        if Recorder.current is None:
            kernel(*args)
        else:
            Recorder.current.call(kernel, *args)

    def add(self: TiledLora, name: str, x_TI: Tensor, y_TO: Tensor) -> None:
        if self.shape.rank_class:
            go(add_by_tables, self.tables, self.group(name), self.shape, x_TI, y_TO)

    def add_in_experts(self: SlotLora, name: str, routes: Routes, x_NI: Tensor, y_NO: Tensor) -> None:
        if self.shape.rank_class:
            go(add_slots_by_tables, self.tables, self.group(name), self.shape, routes, x_NI, y_NO)

    with monkeypatch.context() as patched:
        patched.setattr(TiledLora, "add", add)
        patched.setattr(SlotLora, "add", add_in_experts)
        yield
