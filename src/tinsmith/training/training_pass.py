"""One training pass: items of any number of runs, computed in packs, each one forward and backward over the base.

Owns the order of things and what becomes of each item; the arithmetic is in the context and the head.
Shape letters: T rows of a pack (padded), D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tinsmith.engine import PassStats
from tinsmith.model import BaseModel, padded_rows
from tinsmith.training.context import TrainingContext
from tinsmith.training.head import Head
from tinsmith.training.lanes import Lane, OpProgress
from tinsmith.training.losses import loss_of
from tinsmith.training.packing import DatumRef, list_data, num_fitting
from tinsmith.training.runs import RunSlot, Staging
from tinsmith.training.varlen import attention_for
from tinsmith.types import Failure, RunId, TrainItem, TrainResult


class TorchPass:
    """See `engine.TrainingPass`."""

    def __init__(
        self,
        base: BaseModel,
        head: Head,
        slots: Mapping[RunId, RunSlot],
        items: Sequence[TrainItem],
        *,
        deterministic: bool,
    ) -> None:
        self._base = base
        self._head = head
        self._deterministic = deterministic
        self._stagings = {item.run_id: Staging(slots[item.run_id]) for item in items if item.backward}
        self._ops = [
            OpProgress(
                item=item,
                slot=slots[item.run_id],
                staging=self._stagings[item.run_id] if item.backward else None,
                num_left=len(item.data),
                loss_fn=loss_of(item.loss),
            )
            for item in items
        ]
        self._data = list_data(items)
        self._next = 0

    def advance(self, max_work: int) -> PassStats | None:
        lanes = self._take(max_work)
        if not lanes:
            return None
        num_tokens = lanes[-1].end
        stats = PassStats(
            num_runs=len({lane.op.item.run_id for lane in lanes}),
            num_tokens=num_tokens,
            work=sum(self._work(lane.ref) for lane in lanes),
        )
        for lane in lanes:
            lane.op.max_runs = max(lane.op.max_runs, stats.num_runs)
            lane.op.max_tokens = max(lane.op.max_tokens, num_tokens)
        self._compute(lanes)
        return stats

    @property
    def is_computed(self) -> bool:
        return self._next == len(self._data)

    def commit(self) -> list[TrainResult | Failure]:
        assert self._next == len(self._data), "a pass was committed before all of it was computed"
        for staging in self._stagings.values():
            staging.commit()
        return [op.outcome() for op in self._ops]

    def _take(self, max_work: int) -> list[Lane]:
        """The lanes of the next pack, in order. Data of an op that failed already are passed over."""
        left = [ref for ref in self._data[self._next :] if self._ops[ref.item].failure is None]
        taken = left[: num_fitting([self._work(ref) for ref in left], max_work)]
        self._next = self._data.index(taken[-1], self._next) + 1 if len(taken) < len(left) else len(self._data)
        lanes: list[Lane] = []
        for ref in taken:
            op = self._ops[ref.item]
            op.num_left -= 1
            start = lanes[-1].end if lanes else 0
            lane = Lane(op, ref, start, start + ref.num_tokens)
            lane.load_inputs(self._base.device)
            lanes.append(lane)
        return lanes

    def _work(self, ref: DatumRef) -> int:
        op = self._ops[ref.item]
        return op.loss_fn.work(ref.num_tokens)

    def _compute(self, lanes: Sequence[Lane]) -> None:
        num_tokens = lanes[-1].end
        num_filler = padded_rows(num_tokens) - num_tokens  # rows of a sequence that nobody asked for
        lengths = [lane.ref.num_tokens for lane in lanes] + [num_filler] * (num_filler > 0)
        tokens_T = torch.from_numpy(
            np.concatenate([lane.datum.tokens for lane in lanes] + [np.zeros(num_filler)]).astype(np.int64)
        )
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        wants_grad = any(lane.op.staging is not None for lane in lanes)
        device = self._base.device
        attention = attention_for(device, self._base.dtype)(lengths, device)
        context = TrainingContext(lanes, attention, self._base.lora, deterministic=self._deterministic)
        with torch.set_grad_enabled(wants_grad):
            h_TD = self._base.hidden(tokens_T.to(device), positions_T.to(device), context)
        with torch.no_grad():
            dh_TD = self._head.run(h_TD.detach(), lanes)
        if any(lane.is_live for lane in lanes):
            torch.autograd.backward(h_TD, dh_TD)
