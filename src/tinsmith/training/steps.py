"""Which optimizer steps the runs of a device: one launch for all of them on a GPU, torch's fused kernel elsewhere."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence

import torch

from tinsmith.model.lora.choice import has_triton
from tinsmith.training.optimizer import optim_steps, outcomes_of
from tinsmith.training.runs import RunSlot
from tinsmith.types import AdamParams, Failure, OptimResult

OptimSteps = Callable[[Sequence[RunSlot], Sequence[AdamParams]], list[OptimResult | Failure]]


def optim_steps_for(device: torch.device) -> OptimSteps:
    return launched_steps if device.type == "cuda" and has_triton() else optim_steps


def launched_steps(slots: Sequence[RunSlot], params: Sequence[AdamParams]) -> list[OptimResult | Failure]:
    """As `optimizer.optim_steps`, by the kernels of `adamw_kernels`."""
    kernels = importlib.import_module("tinsmith.training.adamw_kernels")
    for slot in slots:
        slot.fill_rows()
    runs = []
    for slot in slots:
        rows, copy = slot.rows, None if slot.compute_P is slot.rows["param"] else slot.compute_P
        runs.append(kernels.StepRows(rows["param"], rows["grad"], rows["m"], rows["v"], copy, slot.step))
    norms: list[float] = kernels.step_runs(runs, params) if runs else []
    for slot, norm in zip(slots, norms, strict=True):
        if math.isfinite(norm):
            slot.step += 1
            del slot.rows["grad"]
    return outcomes_of(slots, params, norms)
