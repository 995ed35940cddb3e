"""Qwen3-Next: layers that keep a state (the gated delta rule) in three of four, gated attention in the others, and
many small experts beside one for all tokens.

Shape letters: see `model.delta_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinsmith.model.delta_layer import DeltaLayer
from tinsmith.model.families.family import Family
from tinsmith.model.gated import GatedAttention, GatedMixture
from tinsmith.model.routers import softmax_weights


class Qwen3NextDelta(DeltaLayer):
    """in_proj_qkvz gives query, key, values and gates of one key head after another, in_proj_ba its β and g."""

    def project(self, x_1TI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own: Any = self
        kind = self.kind
        each = kind.heads // kind.key_heads
        sizes = [kind.key_size, kind.key_size, each * kind.value_size, each * kind.value_size]
        qkvz: Tensor = own.in_proj_qkvz(x_1TI)[0].view(x_1TI.shape[1], kind.key_heads, -1)
        ba: Tensor = own.in_proj_ba(x_1TI)[0].view(x_1TI.shape[1], kind.key_heads, -1)
        q, k, v, z = (part.flatten(1) for part in torch.split(qkvz, sizes, -1))
        b, a = (part.flatten(1) for part in ba.chunk(2, -1))
        return torch.cat([q, k, v], -1), z, b, a


FAMILY = Family(
    title="Qwen3-Next",
    model_types=("qwen3_next",),
    mlps=("Qwen3NextMLP",),
    experts=("Qwen3NextExperts",),
    routers=("Qwen3NextTopKRouter",),
    expert_weights=softmax_weights,
    stand_ins={
        "Qwen3NextGatedDeltaNet": Qwen3NextDelta,
        "Qwen3NextAttention": GatedAttention,
        "Qwen3NextSparseMoeBlock": GatedMixture,
    },
)
