"""The families of models that have something beyond the common path, one file each."""

from __future__ import annotations

from transformers import PretrainedConfig

from tinsmith.model.families import (
    cohere2,
    deepseek_v3,
    gemma,
    glm4_moe,
    gpt_oss,
    granite,
    kimi_k2,
    llama,
    llama4,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
)
from tinsmith.model.families.family import Family

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES = (
    llama.FAMILY,
    llama4.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    qwen3_next.FAMILY,
    qwen3_5.FAMILY,
    qwen3_5_moe.FAMILY,
    mixtral.FAMILY,
    glm4_moe.FAMILY,
    gpt_oss.FAMILY,
    deepseek_v3.FAMILY,
    kimi_k2.FAMILY,
    gemma.FAMILY,
    qwen2_moe.FAMILY,
    olmoe.FAMILY,
    granite.FAMILY,
    cohere2.FAMILY,
)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model; for one without a file, a family that has nothing of its own."""
    kinds = {config.model_type, config.get_text_config().model_type}
    for family in FAMILIES:
        if kinds & set(family.model_types):
            return family
    return Family(title=str(config.model_type), model_types=(str(config.model_type),))
