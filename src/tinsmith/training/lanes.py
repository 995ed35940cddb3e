"""The bookkeeping of a pass: how far each op is, and which rows of the pack belong to which datum and run.

Plain state that the head, the linear layers and the pass share; no computing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmith.model.lora.tables import to_device
from tinsmith.model.vision import Scene, Sight
from tinsmith.training.load_metrics import load_metrics, replay_metrics
from tinsmith.training.losses import OpLoss
from tinsmith.training.packing import DatumRef
from tinsmith.training.runs import RunSlot, Staging
from tinsmith.types import Datum, Failure, FloatArray, IntArray, TrainItem, TrainResult


@dataclass(slots=True)
class OpProgress:
    """One item of a pass. num_left counts its data that no pack has taken yet: above zero, it may yet be taken back.

    expert_loads: of each layer that has experts, how many times a token was sent to each.
    """

    item: TrainItem
    slot: RunSlot
    staging: Staging | None
    num_left: int
    loss_fn: OpLoss
    failure: Failure | None = None
    loss: float = 0.0
    custom: dict[str, float] = field(default_factory=dict)
    logprobs: dict[int, FloatArray] = field(default_factory=dict)
    max_runs: int = 0
    max_tokens: int = 0
    expert_loads: list[IntArray] = field(default_factory=list)

    def book(self, loss: float, metrics: Mapping[str, float]) -> None:
        """Add a datum's loss and metrics; a `:mean` is one over the request's data."""
        self.loss += loss
        for key, value in metrics.items():
            share = value / len(self.item.data) if key.endswith(":mean") else value
            self.custom[key] = self.custom.get(key, 0.0) + share

    def fail(self, failure: Failure) -> None:
        """Leave no trace of this op in its staging row."""
        if self.failure is None:
            self.failure = failure
            if self.staging is not None:
                self.staging.take_back()

    def outcome(self) -> TrainResult | Failure:
        if self.failure is not None:
            return self.failure
        metrics = {
            "loss:sum": self.loss,
            "tokens:sum": float(self.item.num_tokens),
            "pass_runs:max": float(self.max_runs),
            "pass_tokens:max": float(self.max_tokens),
            **load_metrics(self.expert_loads),
            **replay_metrics(self.item),
            **self.custom,
        }
        return TrainResult(tuple(self.logprobs[i] for i in range(len(self.item.data))), metrics)


@dataclass(slots=True)
class Lane:
    """One datum in a pack: rows start..end. is_live: some coefficient of its loss isn't zero, so it has gradients.
    scene: of its pictures, if it has any. seen: what they show through the run's own adapter of the tower, if it has
    one; leaves of the graph."""

    op: OpProgress
    ref: DatumRef
    start: int
    end: int
    is_live: bool = False
    scene: Scene | None = None
    seen: Sight | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def datum(self) -> Datum:
        return self.op.item.data[self.ref.datum]


def load_inputs(lanes: Sequence[Lane], device: torch.device) -> None:
    """The losses' inputs as tensors, in their dtypes: targets int64, those of native losses float32. To another device
    those of one name and dtype go in one copy, which nothing waits for."""
    alike: dict[tuple[str, np.dtype[Any]], list[Lane]] = {}
    for lane in lanes:
        for name, array in lane.datum.inputs.items():
            if device.type == "cpu":
                lane.inputs[name] = torch.from_numpy(array)
            else:
                alike.setdefault((name, array.dtype), []).append(lane)
    for (name, _), own in alike.items():
        arrays = [lane.datum.inputs[name] for lane in own]
        flat = to_device(np.concatenate([array.reshape(-1) for array in arrays]), device)
        parts = torch.split(flat, [array.size for array in arrays])
        for lane, array, part in zip(own, arrays, parts, strict=True):
            lane.inputs[name] = part.view(array.shape)
