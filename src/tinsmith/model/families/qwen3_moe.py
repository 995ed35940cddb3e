"""Qwen3 with experts: Qwen3's layers, in most of which a router chooses among many small MLPs."""

from tinsmith.model.families.family import Family
from tinsmith.model.routers import softmax_weights

FAMILY = Family(
    title="Qwen3-MoE",
    model_types=("qwen3_moe",),
    norms=("Qwen3MoeRMSNorm",),
    mlps=("Qwen3MoeMLP",),
    attentions=("Qwen3MoeAttention",),
    experts=("Qwen3MoeExperts",),
    routers=("Qwen3MoeTopKRouter",),
    expert_weights=softmax_weights,
)
