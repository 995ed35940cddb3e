"""gpt-oss: sinks and windows in attention; experts with biases, stored transposed, gate and up interleaved."""

from functools import partial
from typing import cast

from torch import nn

from tinsmith.model.activation import clamped_swiglu
from tinsmith.model.families.family import ExpertLayout, Family, Gate
from tinsmith.model.routers import chosen_softmax_weights


def expert_gate(experts: nn.Module, stable: bool) -> Gate:
    return partial(clamped_swiglu, alpha=cast(float, experts.alpha), limit=cast(float, experts.limit))


FAMILY = Family(
    title="gpt-oss",
    model_types=("gpt_oss",),
    experts=("GptOssExperts",),
    expert_layout=ExpertLayout(is_transposed=True, is_concatenated=False, has_bias=True),
    routers=("GptOssTopKRouter",),
    expert_weights=chosen_softmax_weights,
    expert_gate=expert_gate,
)
