"""Granite 3: Llama's layers with factors for embeddings, residuals, attention and logits."""

from transformers import PretrainedConfig

from tinsmith.model.families.family import Family
from tinsmith.model.final import FinalLogits


def final_logits(config: PretrainedConfig) -> FinalLogits:
    return FinalLogits(factor=1 / config.logits_scaling)


FAMILY = Family(
    title="Granite 3",
    model_types=("granite",),
    norms=("GraniteRMSNorm",),
    mlps=("GraniteMLP",),
    final_logits=final_logits,
)
