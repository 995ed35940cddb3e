"""A layer that mixes by the gated delta rule, in the place of transformers' own: linear layers of the pass around what
the pass context does with rows of a sequence.

Shape letters: T rows of the pass, C channels before the convolution, H value heads, D key size, E value size, I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.errors import UnsupportedError
from tinsmith.model.activation import stable_sigmoid
from tinsmith.model.delta import DeltaKind
from tinsmith.model.linear import PassHolder
from tinsmith.model.norm import RMSNorm


class DeltaLayer(nn.Module, ABC):
    """What is alike in all families; how rows are projected is each one's own."""

    def __init__(self, module: nn.Module, holder: PassHolder) -> None:
        super().__init__()
        self._holder = holder
        own: Any = module
        if own.activation != "silu" or own.conv1d.bias is not None:
            raise UnsupportedError(f"{type(module).__name__}: only a convolution with silu and no bias can be carried")
        self.layer_idx = cast(int, own.layer_idx)
        taps_CK = own.conv1d.weight.detach()[:, 0].float()
        self.kind = DeltaKind(taps_CK, own.num_k_heads, own.num_v_heads, own.head_k_dim, own.head_v_dim)
        self._rate_H = own.A_log.detach().double().exp()
        self._shift_H = own.dt_bias.detach().double()
        self.norm = RMSNorm(own.norm.weight, own.norm.variance_epsilon)
        for name, child in module.named_children():
            if name not in ("conv1d", "norm"):
                self.add_module(name, child)

    @abstractmethod
    def project(self, x_1TI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Channels before the convolution [T, C], what gates the outcome [T, H · E], and the raw β and g, [T, H]."""

    def forward(
        self, hidden_states: Tensor, cache_params: object = None, attention_mask: Tensor | None = None, **extras: Any
    ) -> Tensor:
        if attention_mask is not None:
            raise UnsupportedError("a mask came to a layer that keeps a state, where sequences are packed")
        mixed_TC, gate_TX, b_TH, a_TH = self.project(hidden_states)
        # in float64, so that it rounds alike wherever an element stands
        g_TH = (F.softplus(a_TH.double() + self._shift_H) * -self._rate_H).float()
        beta_TH = stable_sigmoid(b_TH.float())
        out_THE = self._holder.context.mix(self.layer_idx, mixed_TC, g_TH, beta_TH, self.kind)
        gate_THE = gate_TX.reshape(out_THE.shape).float()
        y_THE = (self.norm(out_THE) * (gate_THE * stable_sigmoid(gate_THE))).to(hidden_states.dtype)
        out: Tensor = cast(Any, self).out_proj(y_THE.reshape(1, len(y_THE), -1))
        return out
