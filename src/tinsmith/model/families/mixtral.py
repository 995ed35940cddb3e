"""Mixtral: Mistral's layers with a few large experts, whose weights a softmax over those chosen gives."""

from tinsmith.model.families.family import Family
from tinsmith.model.routers import softmax_weights

FAMILY = Family(
    title="Mixtral",
    model_types=("mixtral",),
    norms=("MixtralRMSNorm",),
    attentions=("MixtralAttention",),
    experts=("MixtralExperts",),
    routers=("MixtralTopKRouter",),
    expert_weights=softmax_weights,
)
