"""The families of models that have something beyond the common path, one file each."""

from __future__ import annotations

from transformers import PretrainedConfig

from tinsmith.model.families import (
    cohere2,
    deepseek_v3,
    gemma,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite,
    kimi_k2,
    llama,
    llama4,
    minimax_m2,
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
    qwen3_vl,
    qwen3_vl_moe,
)
from tinsmith.model.families.family import Family
from tinsmith.model.vision.kind import VisionKind

__all__ = ["FAMILIES", "Family", "family_of", "family_of_type", "vision_of"]

FAMILIES = (
    llama.FAMILY,
    llama4.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    qwen3_vl.FAMILY,
    qwen3_vl_moe.FAMILY,
    qwen3_next.FAMILY,
    qwen3_5.FAMILY,
    qwen3_5_moe.FAMILY,
    mixtral.FAMILY,
    glm4_moe.FAMILY,
    glm4_moe_lite.FAMILY,
    gpt_oss.FAMILY,
    deepseek_v3.FAMILY,
    kimi_k2.FAMILY,
    minimax_m2.FAMILY,
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


def family_of_type(model_type: str) -> Family | None:
    """The family of a text model; None: it has no file."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def vision_of(config: PretrainedConfig) -> VisionKind | None:
    """How a whole model looks at pictures; None: it has no vision, or none that is known."""
    vision = family_of(config).vision
    return vision if vision is not None and config.model_type in vision.model_types else None
