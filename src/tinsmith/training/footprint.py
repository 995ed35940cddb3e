"""How much memory a training pass takes, measured on the base that is there.

Two small passes of one sequence with an adapter on every layer, of different lengths: the difference of their peaks is
what a token takes, whatever the model's architecture and however attention and adapters keep their values. The output
head is apart, since it works in chunks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinsmith.model import BaseModel, RowLayout
from tinsmith.training.lanes import Lane, OpProgress
from tinsmith.training.losses import loss_of
from tinsmith.training.packing import DatumRef
from tinsmith.training.runs import RunSlot, Staging
from tinsmith.training.walk import walk
from tinsmith.types import Datum, LossSpec, OpId, RunId, RunSpec, Targets, TrainItem

NUM_TOKENS = {"cpu": (64, 192), "cuda": (512, 1536)}  # of the two passes; without padding inside attention
HEAD_COPIES = 2  # of a chunk's logits: one holds probabilities, one the rows that have a gradient
PROBE = RunSpec(RunId("probe"), "", rank=32, targets=Targets(unembed=False))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a pass: for each token with its activations kept, or recomputed; and beside them, for the head."""

    kept: float
    recomputed: float
    head: int

    def needed(self, num_tokens: int, *, recompute: bool) -> int:
        """At the peak of a pass of so many tokens."""
        return self.head + int(num_tokens * (self.recomputed if recompute else self.kept))


def measure(base: BaseModel, chunk_tokens: int) -> Footprint:
    """Some passes of a few hundred tokens; `num_forwards` of the base doesn't count them.

    Args:
        chunk_tokens: rows whose logits the head holds at once.
    """
    counted = base.num_forwards
    slot = RunSlot.fresh(PROBE, RowLayout.of(base.linears, PROBE, base.dtype), base.device)
    staging = Staging(slot)
    short, long = NUM_TOKENS[base.device.type]
    _pass(base, slot, staging, short, recompute=False)  # makes what is made once, such as packed weights

    def slope(*, recompute: bool) -> float:
        peaks = [
            _peak(base.device, partial(_pass, base, slot, staging, num, recompute=recompute)) for num in (short, long)
        ]
        return (peaks[1] - peaks[0]) / (long - short)

    head = HEAD_COPIES * chunk_tokens * base.head.out_features * torch.float32.itemsize
    found = Footprint(slope(recompute=False), slope(recompute=True), head)
    base.num_forwards = counted
    return found


def _pass(base: BaseModel, slot: RunSlot, staging: Staging, num_tokens: int, *, recompute: bool) -> None:
    datum = Datum(np.zeros(num_tokens, np.int32), {})
    item = TrainItem(OpId("probe"), PROBE.run_id, 1, (datum,), LossSpec("cross_entropy"), backward=True)
    op = OpProgress(item, slot, staging, num_left=0, loss_fn=loss_of(item.loss))
    lane = Lane(op, DatumRef(0, 0, num_tokens), 0, num_tokens, is_live=True)
    h_TD = walk(base, [lane], backward=True, recompute=recompute, deterministic=False)
    torch.autograd.backward(h_TD, torch.zeros_like(h_TD))


def _peak(device: torch.device, work: Callable[[], None]) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    meter = PeakMeter()
    with meter:
        work()
    return meter.peak


class PeakMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that tensors made inside it hold, `now` and at most; scratch space within an operation isn't seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.layout == torch.strided:
                self._see(one.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
