"""Qwen2 with experts: many small ones, and one for all tokens behind a gate."""

from tinsmith.model.families.family import Family
from tinsmith.model.gated import GatedMixture
from tinsmith.model.routers import softmax_weights

FAMILY = Family(
    title="Qwen2-MoE",
    model_types=("qwen2_moe",),
    norms=("Qwen2MoeRMSNorm",),
    mlps=("Qwen2MoeMLP",),
    experts=("Qwen2MoeExperts",),
    peft_half_converts=True,
    routers=("Qwen2MoeTopKRouter",),
    expert_weights=softmax_weights,
    stand_ins={"Qwen2MoeSparseMoeBlock": GatedMixture},
)
