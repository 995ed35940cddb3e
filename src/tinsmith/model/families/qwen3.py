"""Qwen3, dense."""

from tinsmith.model.families.family import Family

FAMILY = Family(
    title="Qwen3",
    model_types=("qwen3",),
    norms=("Qwen3RMSNorm",),
    mlps=("Qwen3MLP",),
    attentions=("Qwen3Attention",),
)
