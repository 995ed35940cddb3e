"""Qwen3.5's language models with experts."""

from tinsmith.model.families.family import Family
from tinsmith.model.families.qwen3_5 import Qwen35Delta
from tinsmith.model.gated import GatedAttention, GatedMixture
from tinsmith.model.routers import softmax_weights

FAMILY = Family(
    title="Qwen3.5-MoE",
    model_types=("qwen3_5_moe_text",),
    mlps=("Qwen3_5MoeMLP",),
    experts=("Qwen3_5MoeExperts",),
    peft_half_converts=True,
    routers=("Qwen3_5MoeTopKRouter",),
    expert_weights=softmax_weights,
    stand_ins={
        "Qwen3_5MoeGatedDeltaNet": Qwen35Delta,
        "Qwen3_5MoeAttention": GatedAttention,
        "Qwen3_5MoeSparseMoeBlock": GatedMixture,
    },
)
