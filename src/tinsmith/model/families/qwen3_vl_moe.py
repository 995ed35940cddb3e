"""Qwen3-VL with experts: the layers of Qwen3-MoE, the vision of Qwen3-VL."""

from tinsmith.model.families.family import Family
from tinsmith.model.families.qwen3_vl import VISION
from tinsmith.model.routers import softmax_weights

FAMILY = Family(
    title="Qwen3-VL-MoE",
    model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
    norms=("Qwen3VLMoeTextRMSNorm",),
    mlps=("Qwen3VLMoeTextMLP",),
    attentions=("Qwen3VLMoeTextAttention",),
    experts=("Qwen3VLMoeTextExperts",),
    routers=("Qwen3VLMoeTextTopKRouter",),
    expert_weights=softmax_weights,
    vision=VISION,
)
