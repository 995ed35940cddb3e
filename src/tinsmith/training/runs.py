"""A run's tensors: one flat float32 row each for parameters, gradients and the two moments; and the staging row.

Rows come to be when something is put into them: no gradients while none are accumulated, no moments before the first
step. A row that isn't there stands for zeros, in memory and in files.
What stays true: nothing of a run changes in a pass until its staging row takes the accumulator's place.
Shape letter: P numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.model import RowLayout, init_row, shape_of
from tinsmith.types import FloatArray, RunSpec, RunState
from tinsmith.validate.lora_fields import shape_text

PARTS = ("param", "grad", "m", "v")
BYTES_PER_PARAM = 4 * len(PARTS)


@dataclass(frozen=True, slots=True)
class Weights:
    """A run's parameters as they once were, on their device; never changed."""

    spec: RunSpec
    step: int
    layout: RowLayout
    row_P: Tensor

    def on_host(self) -> RunState:
        return RunState(self.spec, self.step, self.layout.row_to_tensors("param", self.row_P, copy=False))


class RunSlot:
    """One run in memory. `rows` by part, `param` always among them; `grad` is the accumulator since the last optimizer
    step; `step` counts steps taken."""

    def __init__(self, spec: RunSpec, layout: RowLayout, rows: dict[str, Tensor], step: int) -> None:
        self.spec = spec
        self.layout = layout
        self.rows = rows
        self.step = step
        self.compute_P = rows["param"].to(layout.compute_dtype)  # the row itself, where that is float32
        self.views = layout.views(self.compute_P)
        self.expert_views = layout.expert_views(self.compute_P)

    @classmethod
    def fresh(cls, spec: RunSpec, layout: RowLayout, device: torch.device) -> RunSlot:
        return cls(spec, layout, {"param": init_row(layout, spec).to(device)}, step=0)

    @classmethod
    def restored(
        cls, spec: RunSpec, layout: RowLayout, state: RunState, device: torch.device, *, may_keep: bool = False
    ) -> RunSlot:
        """The slot of a state; with `may_keep` its rows are the state's own arrays, where they lie as they should.

        Raises:
            UserError: the state was made with another rank, other layers or another base model.
        """
        if shape_of(state.spec) != shape_of(spec):
            raise UserError(
                f"the checkpoint has {shape_text(state.spec)}, the run has {shape_text(spec)}: create a run like the "
                "checkpoint"
            )
        parts = {name.partition("/")[0] for name in state.tensors}
        if "param" not in parts:
            raise UserError("the checkpoint holds no weights")
        rows = {
            part: layout.tensors_to_row(part, state.tensors, device, may_keep=may_keep)
            for part in PARTS
            if part in parts
        }
        return cls(spec, layout, rows, step=state.step if state.has_optimizer else 0)

    def fill_rows(self) -> None:
        """Zeros for the rows that aren't there."""
        for part in PARTS:
            if part not in self.rows:
                self.rows[part] = torch.zeros_like(self.rows["param"])

    def refresh(self) -> None:
        """The parameters have changed: so does what passes compute with."""
        if self.compute_P is not self.rows["param"]:
            self.compute_P.copy_(self.rows["param"])

    def export(self, parts: Sequence[str], *, copy: bool = True) -> RunState:
        tensors: dict[str, FloatArray] = {}
        for part in parts:
            if part in self.rows:
                tensors |= self.layout.row_to_tensors(part, self.rows[part], copy=copy)
        return RunState(self.spec, self.step, tensors)

    def copy_weights(self) -> Weights:
        return Weights(self.spec, self.step, self.layout, self.rows["param"].clone())


class Staging:
    """Gradients of one run in the making: a copy of its accumulator, to which data are added in order.

    An op that fails after some of its data were added is taken back: `mark` remembers a group of layers as it was
    before the op.
    """

    def __init__(self, slot: RunSlot) -> None:
        self._slot = slot
        accumulated_P = slot.rows.get("grad")
        self._row_P = torch.zeros_like(slot.rows["param"]) if accumulated_P is None else accumulated_P.clone()
        self.views = slot.layout.views(self._row_P)
        self.expert_views = slot.layout.expert_views(self._row_P)
        self._marks: dict[str, tuple[Tensor, ...]] = {}

    def restart(self) -> None:
        """The accumulator as it is, again; all that was added is forgotten."""
        accumulated_P = self._slot.rows.get("grad")
        if accumulated_P is None:
            self._row_P.zero_()
        else:
            self._row_P.copy_(accumulated_P)
        self._marks.clear()

    def begin_op(self) -> None:
        """The op before is complete and will not be taken back."""
        self._marks.clear()

    def mark(self, group: str) -> None:
        """To be called before an op's first gradient of this group of layers is added, if the op may yet fail."""
        if group not in self._marks:
            self._marks[group] = tuple(view.clone() for view in self._tensors(group))

    def take_back(self) -> None:
        """Every marked group as it was when marked."""
        for group, kept in self._marks.items():
            for view, copy in zip(self._tensors(group), kept, strict=True):
                view.copy_(copy)
        self._marks.clear()

    def _tensors(self, group: str) -> tuple[Tensor, ...]:
        """Of experts, those of all together, since a factor may be shared by them."""
        return (self.views[group] if group in self.views else self.expert_views[group]).tensors

    def commit(self) -> None:
        self._slot.rows["grad"] = self._row_P
