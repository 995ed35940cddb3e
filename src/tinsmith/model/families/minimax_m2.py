"""MiniMax-M2: Mixtral's layers with many small experts chosen by sigmoids; queries and keys normed over all heads."""

from torch import Tensor, nn

from tinsmith.model.families.family import Family


def expert_weights(router: nn.Module, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Sigmoids, without the bias that only serves the choice, divided by their sum."""
    weights_TK = logits_TE.float().sigmoid().gather(1, experts_TK)
    return weights_TK / weights_TK.sum(-1, keepdim=True)


FAMILY = Family(
    title="MiniMax-M2",
    model_types=("minimax_m2",),
    norms=("MiniMaxM2RMSNorm",),
    experts=("MiniMaxM2Experts",),
    routers=("MiniMaxM2TopKRouter",),
    expert_weights=expert_weights,
)
