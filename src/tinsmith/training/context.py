"""The training pass as the base sees it: packed attention, and each datum's own adapter in every linear layer.

Adapters are applied and differentiated datum by datum, and their gradients added straight into the runs' staging rows
in (run, seq, datum) order: the order of additions is what keeps a run's bits free of its neighbours.
Shape letters: T rows of the pass, N rows of a datum, I inputs, O outputs, R rank, H and G heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tinsmith.training.attention import PackedAttention
from tinsmith.training.lanes import Lane


class TrainingContext:
    """See `model.GradContext`."""

    def __init__(self, lanes: Sequence[Lane], attention: PackedAttention, *, backward: bool) -> None:
        self._lanes = lanes
        self._attention = attention
        self._backward = backward
        self._targeted: dict[str, list[Lane]] = {}
        for lane in lanes:
            for name in lane.op.slot.views:
                self._targeted.setdefault(name, []).append(lane)
        self._shrunk: dict[str, list[Tensor]] = {}

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        return self._attention.attend(q_HTD, k_GTD, v_GTD, scale)

    def add_lora(self, name: str, x_TI: Tensor, y_TO: Tensor) -> None:
        shrunk = []
        for lane in self._targeted.get(name, ()):
            slot = lane.op.slot
            a_RI, b_OR = slot.views[name]
            u_NR = x_TI[lane.start : lane.end] @ a_RI.T
            y_TO[lane.start : lane.end].addmm_(u_NR, b_OR.T, alpha=slot.scale)
            shrunk.append(u_NR)
        if self._backward:
            self._shrunk[name] = shrunk

    def forget(self) -> None:
        self._shrunk.clear()

    def needs_input(self, name: str) -> bool:
        return any(lane.op.staging is not None for lane in self._targeted.get(name, ()))

    def add_lora_grad(self, name: str, x_TI: Tensor | None, dy_TO: Tensor, dx_TI: Tensor) -> None:
        for lane, u_NR in zip(self._targeted.get(name, ()), self._shrunk.pop(name), strict=True):
            staging = lane.op.staging
            if staging is None or x_TI is None:
                continue
            if lane.is_live:
                if lane.op.num_left:
                    staging.mark(name)
                slot, rows = lane.op.slot, slice(lane.start, lane.end)
                add_grads(slot.views[name], staging.views[name], x_TI[rows], u_NR, dy_TO[rows], dx_TI[rows], slot.scale)


def add_grads(
    weights: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    x_NI: Tensor,
    u_NR: Tensor,
    dy_NO: Tensor,
    dx_NI: Tensor,
    scale: float,
) -> None:
    """Backward of y += scale · (x Aᵀ) Bᵀ with u = x Aᵀ: adds to dx, and to the gradients of A [R, I] and B [O, R]."""
    (a_RI, b_OR), (da_RI, db_OR) = weights, grads
    g_NR = (dy_NO @ b_OR).mul_(scale)
    dx_NI.addmm_(g_NR, a_RI)
    da_RI.addmm_(g_NR.T, x_NI)
    db_OR.addmm_(dy_NO.T, u_NR, alpha=scale)
