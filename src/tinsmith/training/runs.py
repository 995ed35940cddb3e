"""A run's tensors: one flat float32 row each for parameters, gradients and the two moments; and the staging row.

What stays true: nothing of a run changes in a pass until its staging row takes the accumulator's place.
Shape letter: P numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.model import RowLayout, init_row
from tinsmith.types import FloatArray, RunSpec, RunState

PARTS = ("param", "grad", "m", "v")


class RunSlot:
    """One run in memory. `grad` is the accumulator since the last optimizer step; `step` counts steps taken."""

    def __init__(self, spec: RunSpec, layout: RowLayout, rows: dict[str, Tensor], step: int) -> None:
        self.spec = spec
        self.layout = layout
        self.rows = rows
        self.step = step
        self.scale = spec.alpha / spec.rank
        self.compute_P = rows["param"].to(layout.compute_dtype)  # the row itself, where that is float32
        self.views = layout.views(self.compute_P)

    @classmethod
    def fresh(cls, spec: RunSpec, layout: RowLayout, device: torch.device) -> RunSlot:
        rows = {part: torch.zeros(layout.num_params, device=device) for part in PARTS}
        rows["param"].copy_(init_row(layout, spec))
        return cls(spec, layout, rows, step=0)

    @classmethod
    def restored(cls, spec: RunSpec, layout: RowLayout, state: RunState, device: torch.device) -> RunSlot:
        """Raises: UserError: the state was made with another rank, other layers or another base model."""
        if state.spec.rank != spec.rank or state.spec.targets != spec.targets:
            raise UserError(
                f"the checkpoint has rank {state.spec.rank} and trains {_names(state.spec)}, the run has rank "
                f"{spec.rank} and trains {_names(spec)}: create a run like the checkpoint"
            )
        if not any(name.startswith("param/") for name in state.tensors):
            raise UserError("the checkpoint holds no weights")
        rows = {part: layout.tensors_to_row(part, state.tensors, device) for part in PARTS}
        return cls(spec, layout, rows, step=state.step if state.has_optimizer else 0)

    def refresh(self) -> None:
        """The parameters have changed: so does what passes compute with."""
        if self.compute_P is not self.rows["param"]:
            self.compute_P.copy_(self.rows["param"])

    def export(self, parts: Sequence[str]) -> RunState:
        tensors: dict[str, FloatArray] = {}
        for part in parts:
            tensors |= self.layout.row_to_tensors(part, self.rows[part])
        return RunState(self.spec, self.step, tensors)


class Staging:
    """Gradients of one run in the making: a copy of its accumulator, to which data are added in order.

    An op that fails after some of its data were added is taken back: `mark` remembers a group of layers as it was
    before the op.
    """

    def __init__(self, slot: RunSlot) -> None:
        self._slot = slot
        self._row_P = slot.rows["grad"].clone()
        self.views = slot.layout.views(self._row_P)
        self._marks: dict[str, tuple[Tensor, ...]] = {}

    def begin_op(self) -> None:
        """The op before is complete and will not be taken back."""
        self._marks.clear()

    def mark(self, group: str) -> None:
        """To be called before an op's first gradient of this group of layers is added, if the op may yet fail."""
        if group not in self._marks:
            self._marks[group] = tuple(view.clone() for view in self.views[group].tensors)

    def take_back(self) -> None:
        """Every marked group as it was when marked."""
        for group, kept in self._marks.items():
            for view, copy in zip(self.views[group].tensors, kept, strict=True):
                view.copy_(copy)
        self._marks.clear()

    def commit(self) -> None:
        self._slot.rows["grad"] = self._row_P


def _names(spec: RunSpec) -> str:
    chosen = [name for name in ("attn", "mlp", "unembed") if getattr(spec.targets, name)]
    return "+".join(chosen)
