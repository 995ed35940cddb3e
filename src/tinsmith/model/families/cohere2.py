"""Command R7B (Cohere2): attention and MLP side by side, windows with positions in most layers, none in the others."""

from transformers import PretrainedConfig

from tinsmith.model.families.family import Family
from tinsmith.model.final import FinalLogits


def final_logits(config: PretrainedConfig) -> FinalLogits:
    return FinalLogits(factor=config.logit_scale)


FAMILY = Family(title="Cohere2", model_types=("cohere2",), mlps=("Cohere2MLP",), final_logits=final_logits)
