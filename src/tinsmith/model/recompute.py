"""Activation checkpointing: a decoder layer whose inner values aren't kept for backward, but computed a second time.

Of a layer computed so, only its input stays until backward: memory for one layer's values, plus one row of hidden size
for each token and layer. The second computation runs the same kernels on the same numbers, so gradients have the
same bits. It costs one more forward.
Shape letters: T rows of the pass, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinsmith.errors import UnsupportedError
from tinsmith.model.linear import PassHolder

Forward = Callable[..., Tensor]


def open_layers(backbone: nn.Module, num_layers: int, holder: PassHolder) -> None:
    """Have the decoder layers computed as the holder's pass says.

    Raises:
        UnsupportedError: the model has no list of that many layers.
    """
    lists = [one for one in backbone.modules() if isinstance(one, nn.ModuleList) and len(one) == num_layers]
    if not lists:
        raise UnsupportedError(f"{type(backbone).__name__} has no list of its {num_layers} decoder layers")
    for layer in lists[0]:
        layer.forward = partial(_forward, layer.forward, holder)


def _forward(forward: Forward, holder: PassHolder, hidden: Tensor, **given: Any) -> Tensor:
    if not (holder.recomputes and torch.is_grad_enabled()):
        return forward(hidden, **given)
    out: Tensor = _Recomputed.apply(hidden, forward, holder, given)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, forward: Forward, holder: PassHolder, given: Mapping[str, Any]) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.layer = (forward, holder, holder.context, holder.positions_T, given)
        return forward(hidden, **given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        """The layer's own backward, from values made anew; `add_lora_grad` is called in it as without checkpointing."""
        forward, holder, context, positions_T, given = ctx.layer
        (hidden,) = ctx.saved_tensors
        leaf = hidden.detach().requires_grad_()
        holder.enter(context, positions_T)
        try:
            with torch.enable_grad():
                out = forward(leaf, **given)
        finally:
            holder.leave()
        torch.autograd.backward(out, grad)
        return leaf.grad, None, None, None
