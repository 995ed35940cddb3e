"""DeepSeek-V3: latent attention, whose values are narrower than keys; experts chosen by sigmoids, group by group."""

from tinsmith.model.families.family import Family
from tinsmith.model.routers import sigmoid_weights

FAMILY = Family(
    title="DeepSeek-V3",
    model_types=("deepseek_v3",),
    norms=("DeepseekV3RMSNorm",),
    mlps=("DeepseekV3MLP",),
    experts=("DeepseekV3Experts",),
    routers=("DeepseekV3TopkRouter",),
    expert_weights=sigmoid_weights,
)
