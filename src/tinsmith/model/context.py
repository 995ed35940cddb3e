"""What one pass over the base has to supply: attention among its rows, or what else they know of one another, and the
adapters' part of every linear layer.

The base knows neither sequences nor runs nor caches: training, prefill and decode are three contexts over one model.
Shape letters: T rows of the pass, H query heads, G key/value heads, D head size, I inputs and O outputs of a linear, C
channels of a convolution, E value size.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tinsmith.model.attention import AttentionKind
from tinsmith.model.delta import DeltaKind
from tinsmith.model.routes import Routes


class ExpertAdapters(Protocol):
    """The adapters in one layer's experts in one pass. Groups are `<experts>.w1` (gate and up; up alone is
    `<experts>.w3` where they share no A) and `<experts>.w2`; rows
    are slots of the layer's routes. Called as `PassContext.add_lora` and `GradContext.add_lora_grad` are."""

    def add(self, group: str, x_NI: Tensor, y_NO: Tensor) -> tuple[Tensor, ...]: ...

    def add_grads(self, group: str, x_NI: Tensor, kept: tuple[Tensor, ...], dy_NO: Tensor, dx_NI: Tensor) -> None: ...


class LinearContext(Protocol):
    """What linear layers ask of a pass over the base, or of a look at pictures."""

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        """Add the adapters' contribution to the base's output, in place: y += (x Aᵀ) Bᵀ · alpha / rank.

        Called without autograd, with contiguous tensors. A group is one or more linear layers with the same input,
        whose outputs lie side by side in y; `group` is the path of the first, such as
        `model.layers.0.self_attn.q_proj`. The output head is not among them: its owner is whoever reads the logits.

        Returns:
            What `add_lora_grad` will want beside x; empty if it needn't be called.
        """
        ...


class LinearGradContext(LinearContext, Protocol):
    """The same where outputs are differentiated."""

    def add_lora_grad(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        """Take the adapters' gradients, and add to dx, in place: dx += (dy B) A · alpha / rank.

        Called in the backward pass, last group first, with what `add_lora` returned. A group may be computed twice
        before (activation checkpointing): no activation is kept in the context.
        """
        ...


class OwnRoutes:
    """Of contexts in which routers choose by themselves."""

    def choose(self, router: int, experts_TK: Tensor) -> Tensor:
        return experts_TK


class PassContext(LinearContext, Protocol):
    """One pass. The base hands it every attention and every linear layer, in the order of the model.

    The caller of `BaseModel.hidden` pads its rows to `padded_rows`; the context sees those rows too and may leave
    anything finite in them.
    """

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        """Causal attention of each sequence by itself; rotary embedding has been applied, H is a multiple of G.

        Args:
            layer: index of the decoder layer, from 0.
            q_HTD, k_GTD, v_GTD: strided views, as a rule with memory in the order T, H, D.
            kind: what it sees and what becomes of its scores.

        Returns:
            o_THD, shape [T, H, D].
        """
        ...

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        """The gated delta rule along each sequence by itself, after the convolution of its channels; see `delta`.

        Args:
            layer: as above; each layer attends or mixes.
            mixed_TC: before the convolution. g_TH, beta_TH: float32, g at most 0.

        Returns:
            o_THE, shape [T, H, E].
        """
        ...

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        """The rows of the pass go to the experts of a layer, whose path is `name`, by these routes.

        Called once for each layer that has experts, or twice with activation checkpointing.
        """
        ...

    def choose(self, router: int, experts_TK: Tensor) -> Tensor:
        """The experts to which rows go, after a router chose, before `experts`.

        Args:
            router: its place among the model's routers, from 0.
            experts_TK: int64, its own choice.

        Returns:
            The same tensor, or another one: int64 [T, K].
        """
        ...


class GradContext(PassContext, LinearGradContext, Protocol):
    """A pass whose hidden states are differentiated. With autograd on, the context must be of this kind."""
