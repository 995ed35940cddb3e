"""Mixtral: Mistral's layers with a few large experts, whose weights a softmax over those chosen gives."""

from tinsmith.model.families.family import Family

FAMILY = Family(
    title="Mixtral",
    model_types=("mixtral",),
    norms=("MixtralRMSNorm",),
    attentions=("MixtralAttention",),
    experts=("MixtralExperts",),
    routers=("MixtralTopKRouter",),
)
