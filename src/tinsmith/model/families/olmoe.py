"""OLMoE: queries and keys normed over all heads at once, and experts whose weights need not add up to one."""

from tinsmith.model.families.family import Family
from tinsmith.model.routers import softmax_weights

FAMILY = Family(
    title="OLMoE",
    model_types=("olmoe",),
    norms=("OlmoeRMSNorm",),
    experts=("OlmoeExperts",),
    routers=("OlmoeTopKRouter",),
    expert_weights=softmax_weights,
)
