"""Which optimizer steps the runs of a device: one launch for all of them on a GPU, a compiled program on the CPU; where
these can't be had, torch's fused kernel."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from tinsmith.crashpoints import crash_point
from tinsmith.model.lora.choice import has_triton
from tinsmith.training.compiled_adamw import PROGRAM, compiled_steps
from tinsmith.training.optimizer import optim_steps, outcomes_of
from tinsmith.training.runs import RunSlot
from tinsmith.types import AdamParams, Failure, OptimResult

OptimSteps = Callable[[Sequence[RunSlot], Sequence[AdamParams]], list[OptimResult | Failure]]


def optim_steps_for(device: torch.device, *, may_compile: bool = True) -> OptimSteps:
    """Of adapters."""
    return launched_steps if device.type == "cuda" and has_triton() else full_steps_for(device, may_compile=may_compile)


def full_steps_for(device: torch.device, *, may_compile: bool = True) -> OptimSteps:
    """Of full runs, whose layouts may have pieces that no step goes over."""
    kernel = PROGRAM.kernel if may_compile and device.type == "cpu" else None
    return optim_steps if kernel is None else partial(compiled_steps, kernel)


def launched_steps(slots: Sequence[RunSlot], params: Sequence[AdamParams]) -> list[OptimResult | Failure]:
    """As `optimizer.optim_steps`, by the kernels of `adamw_kernels`."""
    kernels = importlib.import_module("tinsmith.training.adamw_kernels")
    held = [(*slot.rows,) for slot in slots]
    for slot in slots:
        slot.fill_rows()
    runs = []
    for slot in slots:
        rows, copy = slot.rows, None if slot.compute_P is slot.rows["param"] else slot.compute_P
        runs.append(kernels.StepRows(rows["param"], rows["grad"], rows["m"], rows["v"], copy, slot.step))
    norms: list[float] = kernels.step_runs(runs, params) if runs else []
    crash_point("optim.half_done")
    for slot, norm, parts in zip(slots, norms, held, strict=True):
        if math.isfinite(norm):
            slot.step += 1
            del slot.rows["grad"]
        else:
            slot.rows = {part: slot.rows[part] for part in parts}
    return outcomes_of(slots, params, norms)
