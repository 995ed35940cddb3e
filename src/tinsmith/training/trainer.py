"""All runs of one base: their slots, the passes over them and their optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

from tinsmith.config import Settings
from tinsmith.model import BaseModel, RowLayout
from tinsmith.training.heads import make_head
from tinsmith.training.runs import PARTS, RunSlot
from tinsmith.training.steps import optim_steps_for
from tinsmith.training.training_pass import TorchPass
from tinsmith.types import Failure, OptimItem, OptimResult, RunId, RunSpec, RunState, TrainItem


class Trainer:
    """The training half of an engine; methods as in `engine.Engine`."""

    def __init__(self, base: BaseModel, settings: Settings) -> None:
        self._base = base
        self._head = make_head(base, settings.loss_chunk_tokens)
        self._optim_steps = optim_steps_for(base.device)
        self._deterministic = settings.deterministic
        self._slots: dict[RunId, RunSlot] = {}

    def has_run(self, run_id: RunId) -> bool:
        return run_id in self._slots

    def create_run(self, spec: RunSpec) -> None:
        self._slots[spec.run_id] = RunSlot.fresh(spec, self._layout(spec), self._base.device)

    def import_run(self, spec: RunSpec, state: RunState) -> None:
        self._slots[spec.run_id] = RunSlot.restored(spec, self._layout(spec), state, self._base.device)

    def export_run(self, run_id: RunId, parts: Sequence[str] = PARTS) -> RunState:
        return self._slots[run_id].export(parts)

    def drop_run(self, run_id: RunId) -> None:
        self._slots.pop(run_id, None)

    def start_pass(self, items: Sequence[TrainItem]) -> TorchPass:
        return TorchPass(self._base, self._head, self._slots, items, deterministic=self._deterministic)

    def optim_step(self, items: Sequence[OptimItem]) -> list[OptimResult | Failure]:
        return self._optim_steps([self._slots[item.run_id] for item in items], [item.params for item in items])

    def _layout(self, spec: RunSpec) -> RowLayout:
        return RowLayout(self._base.linears, spec.targets, spec.rank, self._base.dtype)
