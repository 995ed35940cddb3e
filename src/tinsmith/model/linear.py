"""Frozen linear layers that adapters of many runs hook into; layers with the same input are one product.

Owns the base's matrix product, forward and backward. Refuses to know adapters: the pass context adds them. The base
weight never gets a gradient, and adapters are no autograd parameters.
Shape letters: T rows of the pass, I inputs, O outputs of all layers of a group side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tinsmith.model.context import LinearContext, LinearGradContext, PassContext
from tinsmith.model.frozen import FrozenMatrix


class Holder(Protocol):
    """Where linear layers find the context of what is running. anchor: an input by which a product is differentiated
    although its x isn't, for its adapters' sake; it never gets a gradient."""

    anchor: Tensor

    @property
    def context(self) -> LinearContext: ...


class PassHolder:
    """Where the layers of one base find the context of the pass that is running.

    recomputes: decoder layers keep nothing but their input for backward, see `model.recompute`.
    positions_T: of the pass's rows in their sequences, for layers that compute with them. anchor: see `Holder`.
    """

    def __init__(self) -> None:
        self._context: PassContext | None = None
        self._positions_T: Tensor | None = None
        self.recomputes = False
        self.anchor = torch.zeros((), requires_grad=True)

    @property
    def context(self) -> PassContext:
        assert self._context is not None, "a layer of the base was called outside a pass"
        return self._context

    @property
    def positions_T(self) -> Tensor:
        assert self._positions_T is not None, "a layer of the base was called outside a pass"
        return self._positions_T

    def enter(self, context: PassContext, positions_T: Tensor, *, recomputes: bool = False) -> None:
        assert self._context is None, "a pass is already running over this base"
        self._context = context
        self._positions_T = positions_T
        self.recomputes = recomputes

    def leave(self) -> None:
        self._context = self._positions_T = None
        self.recomputes = False


class LinearGroup:
    """y = x Wᵀ + b of layers with the same input, side by side, plus what the pass context adds for each adapter.

    `name` is that of the first layer, its path in the model; `holder` is shared by all groups of one base, or of its
    vision tower.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], holder: Holder) -> None:
        layers = list(linears.values())
        self.names = tuple(linears)
        self.name = self.names[0]
        self.widths = [layer.out_features for layer in layers]
        self.matrix = FrozenMatrix(*(layer.weight for layer in layers))
        self.bias_O = _side_by_side(layers)
        self._holder = holder
        self._x: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]; leading dimensions are flattened to the rows of the pass."""
        context = self._holder.context
        x_TI = x.reshape(-1, self.matrix.in_features)
        if torch.is_grad_enabled():
            y_TO: Tensor = _Product.apply(x_TI, self._holder.anchor, self, context)  # type: ignore[no-untyped-call]
        else:
            y_TO = self.matrix.times(x_TI, self.bias_O)
            context.add_lora(self.name, x_TI, y_TO)
        return y_TO.view(*x.shape[:-1], self.matrix.out_features)

    def part(self, index: int, x: Tensor) -> Tensor:
        """The outputs of one layer, which may be changed in place, as OLMo does.

        The first layer that comes with an input computes all, the others take theirs; an input that isn't the same
        tensor, or a part that was taken, makes a product of its own.
        """
        if len(self.widths) == 1:
            return self(x)
        if self._x is not x or index not in self._parts:
            self._parts = dict(enumerate(torch.unsafe_split_with_sizes(self(x), self.widths, -1)))
        part = self._parts.pop(index)
        self._x = x if self._parts else None
        return part

    def drop_parts(self) -> tuple[str, ...]:
        """Forget what nobody took. Returns the names of those layers."""
        left = tuple(self.names[index] for index in self._parts)
        self._x, self._parts = None, {}
        return left


class GroupedLinear(nn.Module):
    """One layer of a group, in the place of the model's nn.Linear."""

    def __init__(self, group: LinearGroup, index: int) -> None:
        super().__init__()
        self.group = group
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O_l]; a view where the group has other layers."""
        return self.group.part(self._index, x)


class _Product(torch.autograd.Function):
    """The base's product and the adapters' in one node, so that no gradient is made for either's weights, nor for an x
    that needs none."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, anchor: Tensor, group: LinearGroup, context: LinearContext) -> Tensor:
        y_TO = group.matrix.times(x_TI, group.bias_O)
        kept = context.add_lora(group.name, x_TI, y_TO)
        ctx.group, ctx.context = group, context
        if kept:
            ctx.save_for_backward(x_TI, *kept)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, None, None, None]:
        group = cast(LinearGroup, ctx.group)
        dy_TO = dy_TO.contiguous()
        is_wanted = ctx.needs_input_grad[0]
        dx_TI = group.matrix.times_transpose(dy_TO) if is_wanted else None
        if ctx.saved_tensors:
            x_TI, *kept = ctx.saved_tensors
            sum_TI = torch.zeros_like(x_TI) if dx_TI is None else dx_TI  # the adapters add to it all the same
            cast(LinearGradContext, ctx.context).add_lora_grad(group.name, x_TI, tuple(kept), dy_TO, sum_TI)
        return dx_TI, None, None, None


def group_linears(
    model: nn.Module, linears: dict[str, nn.Linear], leads: Mapping[str, str], holder: Holder
) -> list[LinearGroup]:
    """Put a GroupedLinear in the place of each linear layer; those with the same lead share one product. Empties
    `linears`: no weight is held twice for longer than its group is made."""
    members: dict[str, dict[str, nn.Linear]] = {}
    for name in list(linears):
        members.setdefault(leads[name], {})[name] = linears.pop(name)
    groups = []
    while members:
        groups.append(LinearGroup(members.pop(next(iter(members))), holder))
        for index, name in enumerate(groups[-1].names):
            model.set_submodule(name, GroupedLinear(groups[-1], index))
    return groups


def _side_by_side(layers: Sequence[nn.Linear]) -> Tensor | None:
    """The biases, zero for a layer without."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat([bias.detach() for bias in biases])
