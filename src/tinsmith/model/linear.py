"""A frozen linear layer that adapters of many runs hook into.

Owns the base's matrix product, forward and backward. Refuses to know adapters: the pass context adds them. The base
weight never gets a gradient, and adapters are no autograd parameters.
Shape letters: T rows of the pass, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tinsmith.model.context import GradContext, PassContext
from tinsmith.model.frozen import FrozenMatrix


class PassHolder:
    """Where the layers of one base find the context of the pass that is running.

    recomputes: decoder layers keep nothing but their input for backward, see `model.recompute`.
    """

    def __init__(self) -> None:
        self._context: PassContext | None = None
        self.recomputes = False

    @property
    def context(self) -> PassContext:
        assert self._context is not None, "a layer of the base was called outside a pass"
        return self._context

    def enter(self, context: PassContext, *, recomputes: bool = False) -> None:
        assert self._context is None, "a pass is already running over this base"
        self._context = context
        self.recomputes = recomputes

    def leave(self) -> None:
        self._context = None
        self.recomputes = False


class GroupedLinear(nn.Module):
    """y = x Wᵀ + b, plus what the pass context adds for the rows of each adapter.

    `name` is the module's path in the model, `holder` is shared by all layers of one base.
    """

    def __init__(self, linear: nn.Linear, name: str, holder: PassHolder) -> None:
        super().__init__()
        self.matrix = FrozenMatrix(linear.weight)
        self.bias_O = None if linear.bias is None else linear.bias.detach()
        self.name = name
        self._holder = holder

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]; leading dimensions are flattened to the rows of the pass."""
        context = self._holder.context
        x_TI = x.reshape(-1, self.matrix.in_features)
        if torch.is_grad_enabled():
            y_TO: Tensor = _GroupedLinear.apply(x_TI, self, context)  # type: ignore[no-untyped-call]
        else:
            y_TO = self.matrix.times(x_TI, self.bias_O)
            context.add_lora(self.name, x_TI, y_TO)
        return y_TO.view(*x.shape[:-1], self.matrix.out_features)


class _GroupedLinear(torch.autograd.Function):
    """The base's product and the adapters' in one node, so that no gradient is made for either's weights."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, layer: GroupedLinear, context: GradContext) -> Tensor:
        y_TO = layer.matrix.times(x_TI, layer.bias_O)
        context.add_lora(layer.name, x_TI, y_TO)
        ctx.layer, ctx.context = layer, context
        if context.needs_input(layer.name):
            ctx.save_for_backward(x_TI)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor, None, None]:
        layer = cast(GroupedLinear, ctx.layer)
        dy_TO = dy_TO.contiguous()
        dx_TI = layer.matrix.times_transpose(dy_TO)
        (x_TI,) = ctx.saved_tensors or (None,)
        cast(GradContext, ctx.context).add_lora_grad(layer.name, x_TI, dy_TO, dx_TI)
        return dx_TI, None, None
