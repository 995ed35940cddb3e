"""GLM-4.5: the first layers are dense; then experts chosen by sigmoids, group by group, and an MLP for all tokens."""

from tinsmith.model.families.family import Family
from tinsmith.model.routers import sigmoid_weights

FAMILY = Family(
    title="GLM-4.5",
    model_types=("glm4_moe",),
    norms=("Glm4MoeRMSNorm",),
    mlps=("Glm4MoeMLP",),
    experts=("Glm4MoeExperts",),
    routers=("Glm4MoeTopkRouter",),
    expert_weights=sigmoid_weights,
)
