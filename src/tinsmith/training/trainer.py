"""All runs of one base: their slots, the passes over them and their optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinsmith.config import Settings
from tinsmith.engine import TrainingPass
from tinsmith.model import BaseModel, RowLayout, shape_of
from tinsmith.training.budget import Budget
from tinsmith.training.footprint import measure
from tinsmith.training.full import FullPass, JointPass
from tinsmith.training.full_model import FullModel
from tinsmith.training.heads import chunk_tokens, make_head
from tinsmith.training.runs import BYTES_PER_PARAM, PARTS, RunSlot, Weights
from tinsmith.training.shortage import is_out_of_memory, memory_for, reclaim
from tinsmith.training.steps import full_steps_for, optim_steps_for
from tinsmith.training.training_pass import TorchPass
from tinsmith.types import Failure, OptimItem, OptimResult, RunId, RunSpec, RunState, TrainItem


class Trainer:
    """The training half of an engine; methods as in `engine.Engine`."""

    def __init__(self, base: BaseModel, settings: Settings) -> None:
        self._base = base
        self._chunk_tokens = chunk_tokens(base, settings.loss_chunk_tokens)
        self._head = make_head(base, self._chunk_tokens, deterministic=settings.deterministic)
        may_compile = settings.compiled_adapters
        self._optim_steps = optim_steps_for(base.device, may_compile=may_compile)
        self._full_steps = full_steps_for(base.device, may_compile=may_compile)
        self._deterministic = settings.deterministic
        self.budget = Budget(settings, base.device)
        self._slots: dict[RunId, RunSlot] = {}
        self._layouts: dict[RunSpec, RowLayout] = {}
        self.full = FullModel(base.info, base.device, self.budget.free_bytes)
        self.num_bytes = 0  # what the runs may take at most, between passes

    def start(self) -> None:
        """Measure what a pass takes, and go by the memory that is free from now on."""
        eyes = self._base.eyes
        kept = (lambda: 0) if eyes is None else (lambda: eyes.room_bytes)
        self.budget.start(measure(self._base, self._chunk_tokens), kept)

    def has_run(self, run_id: RunId) -> bool:
        return run_id in self._slots

    def create_run(self, spec: RunSpec) -> None:
        with memory_for("a new run"):
            slot = None if spec.is_full else RunSlot.fresh(spec, self._layout(spec), self._base.device)
            self._put(self.full.fresh(spec) if slot is None else slot)

    def run_bytes(self, spec: RunSpec) -> int:
        """With the copy that passes compute with, where that isn't float32; if full, with gradients in the making."""
        if spec.is_full:
            return self.full.needed_bytes
        copy = 0 if self._base.dtype == torch.float32 else self._base.dtype.itemsize
        return self._layout(spec).num_params * (BYTES_PER_PARAM + copy)

    def import_run(self, spec: RunSpec, state: RunState, *, may_keep: bool = False) -> None:
        with memory_for("the run's state"):
            if spec.is_full and not self.has_run(spec.run_id):
                stays = may_keep and self._base.device.type == "cpu"
                self.full.require_room(sum(tensor.nbytes for tensor in state.tensors.values()) if stays else 0)
            self._put(RunSlot.restored(spec, self._layout(spec), state, self._base.device, may_keep=may_keep))

    def export_run(self, run_id: RunId, parts: Sequence[str] = PARTS, *, copy: bool = True) -> RunState:
        return self._slots[run_id].export(parts, copy=copy)

    def copy_weights(self, run_id: RunId) -> Weights:
        """The run's weights as they are now, where they are."""
        if self._slots[run_id].spec.is_full:
            self.full.require_copy()
        with memory_for("a copy of the run's weights"):
            return self._slots[run_id].copy_weights()

    def drop_run(self, run_id: RunId) -> None:
        slot = self._slots.pop(run_id, None)
        if slot is not None:
            self.num_bytes -= self.run_bytes(slot.spec)

    def _put(self, slot: RunSlot) -> None:
        self.drop_run(slot.spec.run_id)
        self._slots[slot.spec.run_id] = slot
        self.num_bytes += self.run_bytes(slot.spec)

    def start_pass(self, items: Sequence[TrainItem]) -> TrainingPass:
        try:
            return self._pass(items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        reclaim()  # no memory for the staging rows
        with memory_for("the gradients of a pass"):
            return self._pass(items)

    def _pass(self, items: Sequence[TrainItem]) -> TrainingPass:
        """Adapters share one pass; each full run has one of its own."""
        by_run: dict[RunId | None, list[int]] = {}
        for index, item in enumerate(items):
            by_run.setdefault(item.run_id if self._slots[item.run_id].spec.is_full else None, []).append(index)
        if by_run.keys() == {None}:
            return self._shared_pass(items)
        passes: list[TrainingPass] = []
        places: dict[int, tuple[int, int]] = {}
        for number, (run_id, indices) in enumerate(by_run.items()):
            own = [items[index] for index in indices]
            passes.append(self._shared_pass(own) if run_id is None else FullPass(self.full, self._slots[run_id], own))
            places |= {index: (number, place) for place, index in enumerate(indices)}
        return JointPass(passes, [places[index] for index in range(len(items))])

    def _shared_pass(self, items: Sequence[TrainItem]) -> TorchPass:
        return TorchPass(self._base, self._head, self.budget, self._slots, items, deterministic=self._deterministic)

    def optim_step(self, items: Sequence[OptimItem]) -> list[OptimResult | Failure]:
        with memory_for("the optimizer step"):
            outcomes: dict[RunId, OptimResult | Failure] = {}
            for is_full, step in ((False, self._optim_steps), (True, self._full_steps)):
                own = [item for item in items if self._slots[item.run_id].spec.is_full == is_full]
                found = step([self._slots[item.run_id] for item in own], [item.params for item in own])
                outcomes |= {item.run_id: outcome for item, outcome in zip(own, found, strict=True)}
            return [outcomes[item.run_id] for item in items]

    def _layout(self, spec: RunSpec) -> RowLayout:
        if spec.is_full:
            return self.full.layout()
        key = shape_of(spec)
        if key not in self._layouts:
            self._layouts[key] = RowLayout.of(self._base.linears, spec, self._base.dtype)
        return self._layouts[key]
