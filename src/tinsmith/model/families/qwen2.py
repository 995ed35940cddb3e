"""Qwen2 and Qwen2.5."""

from tinsmith.model.families.family import Family

FAMILY = Family(
    title="Qwen2.5",
    model_types=("qwen2",),
    norms=("Qwen2RMSNorm",),
    mlps=("Qwen2MLP",),
    attentions=("Qwen2Attention",),
)
