"""What a family of models needs beyond the common path: the shape of the files in this folder.

The common path hooks every nn.Linear of attention and MLP and transformers' attention interface, and checks at start
that the opened model still gives its own logits. A family whose parts are all of that kind is served without a file
here; a file makes it faster, by naming modules whose code was read and is known, or says what hooks can't see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import SiLUActivation

from tinsmith.errors import UnsupportedError
from tinsmith.model.activation import gated_silu
from tinsmith.model.final import FinalLogits
from tinsmith.model.vision.kind import VisionKind

Gate = Callable[[Tensor], Tensor]


def as_they_are(config: PretrainedConfig) -> FinalLogits:
    return FinalLogits()


def silu_gate(experts: nn.Module, stable: bool) -> Gate:
    """silu(gate) · up.

    Raises:
        UnsupportedError: these experts have another activation.
    """
    if not isinstance(experts.act_fn, (nn.SiLU, SiLUActivation)):
        raise UnsupportedError(f"experts whose activation is {type(experts.act_fn).__name__} can't be carried")
    return partial(gated_silu, stable=stable)


@dataclass(frozen=True, slots=True)
class Family:
    """
    Args:
        title: as people call it.
        model_types: `model_type` of config.json, or of its text_config.
        norms: classes that compute x / rms(x) · weight, with `weight` and `variance_epsilon`.
        mlps: classes that compute down_proj(act_fn(gate_proj(x)) · up_proj(x)); used where act_fn is SiLU.
        attentions: classes that project by q_proj, k_proj and v_proj, norm heads by q_norm and k_norm where they have
            them, rotate halves, attend, and project by o_proj.
        experts: classes of a layer's experts, called with rows, the experts of each row and their weights, that hold
            `gate_up_proj` and `down_proj` of all and say by `is_transposed`, `is_concatenated` and `has_bias` how.
        routers: classes that choose them, with a weight of their own, which stays as it is.
        expert_gate: what the experts do between their two products, [N, 2I] to [N, I], gate and up side by side.
        final_logits: what becomes of the logits after the head, from the text model's configuration.
        vision: how its models with vision look at pictures.
    """

    title: str
    model_types: tuple[str, ...]
    norms: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    expert_gate: Callable[[nn.Module, bool], Gate] = silu_gate
    final_logits: Callable[[PretrainedConfig], FinalLogits] = as_they_are
    vision: VisionKind | None = None
