"""How much memory a training pass takes, measured on the base that is there.

Two small passes of one sequence with an adapter on every layer, of different lengths: the difference of their peaks is
what a token takes, whatever the model's architecture and however attention and adapters keep their values. The output
head is apart, since it works in chunks. Where there are pictures, each token has room for what one may show.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tinsmith.model import BaseModel, RowLayout
from tinsmith.model.peak import peak_bytes
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
            peak_bytes(base.device, partial(_pass, base, slot, staging, num, recompute=recompute))
            for num in (short, long)
        ]
        return (peaks[1] - peaks[0]) / (long - short)

    head = HEAD_COPIES * chunk_tokens * base.head.out_features * torch.float32.itemsize
    shown = 0.0 if base.eyes is None else base.eyes.row_bytes
    found = Footprint(slope(recompute=False) + shown, slope(recompute=True) + shown, head)
    base.num_forwards = counted
    return found


def _pass(base: BaseModel, slot: RunSlot, staging: Staging, num_tokens: int, *, recompute: bool) -> None:
    datum = Datum(np.zeros(num_tokens, np.int32), {})
    item = TrainItem(OpId("probe"), PROBE.run_id, 1, (datum,), LossSpec("cross_entropy"), backward=True)
    op = OpProgress(item, slot, staging, num_left=0, loss_fn=loss_of(item.loss))
    lane = Lane(op, DatumRef(0, 0, num_tokens), 0, num_tokens, is_live=True)
    h_TD = walk(base, [lane], backward=True, recompute=recompute, deterministic=False)
    torch.autograd.backward(h_TD, torch.zeros_like(h_TD))
