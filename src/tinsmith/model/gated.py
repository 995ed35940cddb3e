"""Attention whose outcome is gated, and a mixture of experts beside an MLP that is gated: what Qwen's newer models do,
with sigmoids whose bits don't depend on an element's place.

Shape letters: T rows of the pass, H and G query and key/value heads, E head size, X those of a head that are rotated, D
hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tinsmith.errors import UnsupportedError
from tinsmith.model.activation import stable_sigmoid
from tinsmith.model.attention import AttentionKind
from tinsmith.model.linear import PassHolder
from tinsmith.model.rotary import rotate


class GatedAttention(nn.Module):
    """o_proj(attention · sigmoid(gate)), where q_proj gives a query and a gate for each head; the first part of a head
    is rotated."""

    def __init__(self, module: nn.Module, holder: PassHolder) -> None:
        super().__init__()
        self._holder = holder
        self.layer_idx = cast(int, module.layer_idx)
        self.head_dim = cast(int, module.head_dim)
        self.kind = AttentionKind(cast(float, module.scaling))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.q_norm, self.k_norm = (
            cast(Any, getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **extras: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise UnsupportedError("a mask came to attention, where only plain causal attention is served")
        cos_TX, sin_TX = position_embeddings[0][0], position_embeddings[1][0]
        both: Tensor = self.q_proj(hidden_states)[0].view(hidden_states.shape[1], -1, 2 * self.head_dim)
        q_THE, gate_THE = both.chunk(2, -1)
        k_TGE, v_TGE = (
            project(hidden_states)[0].view(len(q_THE), -1, self.head_dim) for project in (self.k_proj, self.v_proj)
        )
        q_THE, k_TGE = (_rotated(norm(x), cos_TX, sin_TX) for norm, x in ((self.q_norm, q_THE), (self.k_norm, k_TGE)))
        out_THE = self._holder.context.attend(
            self.layer_idx, q_THE.transpose(0, 1), k_TGE.transpose(0, 1), v_TGE.transpose(0, 1), self.kind
        )
        out_THE = out_THE * stable_sigmoid(gate_THE)
        return self.o_proj(out_THE.reshape(1, len(out_THE), -1)), None


class GatedMixture(nn.Module):
    """experts(x) + sigmoid(w · x) · shared(x)."""

    def __init__(self, module: nn.Module, holder: PassHolder) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_expert = (
            cast(Any, getattr(module, name)) for name in ("gate", "experts", "shared_expert")
        )
        self._weight_1D = cast(nn.Linear, module.shared_expert_gate).weight.detach()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, chosen_TK = self.gate(x_TD)
        share_T1 = stable_sigmoid((x_TD.float() * self._weight_1D.float()).sum(-1, keepdim=True)).to(x_TD.dtype)
        out_TD: Tensor = self.experts(x_TD, chosen_TK, weights_TK) + share_T1 * self.shared_expert(x_TD)
        return out_TD.view(hidden_states.shape)


def _rotated(x_THE: Tensor, cos_TX: Tensor, sin_TX: Tensor) -> Tensor:
    size = cos_TX.shape[-1]
    if size == x_THE.shape[-1]:
        return rotate(x_THE, cos_TX, sin_TX)
    return torch.cat([rotate(x_THE[..., :size], cos_TX, sin_TX), x_THE[..., size:]], -1)
