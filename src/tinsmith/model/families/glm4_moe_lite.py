"""GLM-4.7-Flash: DeepSeek-V3's latent attention, and GLM-4.5's experts beside an MLP for all tokens."""

from tinsmith.model.families.family import Family
from tinsmith.model.routers import sigmoid_weights

FAMILY = Family(
    title="GLM-4.7-Flash",
    model_types=("glm4_moe_lite",),
    norms=("Glm4MoeLiteRMSNorm",),
    mlps=("Glm4MoeLiteMLP",),
    experts=("Glm4MoeLiteExperts",),
    routers=("Glm4MoeLiteTopkRouter",),
    expert_weights=sigmoid_weights,
)
