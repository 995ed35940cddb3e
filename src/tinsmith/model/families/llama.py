"""Llama 3.x, and the many models that share its architecture."""

from tinsmith.model.families.family import Family

FAMILY = Family(
    title="Llama 3",
    model_types=("llama",),
    norms=("LlamaRMSNorm",),
    mlps=("LlamaMLP",),
    attentions=("LlamaAttention",),
)
