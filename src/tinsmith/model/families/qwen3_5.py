"""Qwen3.5's dense language models: Qwen3-Next's layers, with a linear layer for each thing.

Shape letters: see `model.delta_layer`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinsmith.model.delta_layer import DeltaLayer
from tinsmith.model.families.family import Family
from tinsmith.model.gated import GatedAttention


class Qwen35Delta(DeltaLayer):
    def project(self, x_1TI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own: Any = self
        mixed, z, b, a = (
            project(x_1TI)[0] for project in (own.in_proj_qkv, own.in_proj_z, own.in_proj_b, own.in_proj_a)
        )
        return mixed, z, b, a


FAMILY = Family(
    title="Qwen3.5",
    model_types=("qwen3_5_text",),
    mlps=("Qwen3_5MLP",),
    stand_ins={"Qwen3_5GatedDeltaNet": Qwen35Delta, "Qwen3_5Attention": GatedAttention},
)
