"""Gemma 2 and Gemma 3 (text): windows in some layers; in Gemma 2 capped scores and capped logits."""

from transformers import PretrainedConfig

from tinsmith.model.families.family import Family
from tinsmith.model.final import FinalLogits


def final_logits(config: PretrainedConfig) -> FinalLogits:
    return FinalLogits(cap=getattr(config, "final_logit_softcapping", None))


FAMILY = Family(title="Gemma 2 and 3", model_types=("gemma2", "gemma3_text"), final_logits=final_logits)
