"""What a family of models needs beyond the common path: the shape of the files in this folder.

The common path hooks every nn.Linear of attention and MLP and transformers' attention interface, and checks at start
that the opened model still gives its own logits. A family whose parts are all of that kind is served without a file
here; a file makes it faster, by naming modules whose code was read and is known, or says what hooks can't see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import SiLUActivation

from tinsmith.errors import UnsupportedError
from tinsmith.model.activation import gated_silu
from tinsmith.model.final import FinalLogits
from tinsmith.model.linear import PassHolder
from tinsmith.model.routers import Weigh
from tinsmith.model.vision.kind import VisionKind

Gate = Callable[[Tensor], Tensor]
StandIn = Callable[[nn.Module, PassHolder], nn.Module]


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
class ExpertLayout:
    """How the weights of a layer's experts are stored: with outputs last (is_transposed), gate and up one after the
    other or in turn (is_concatenated), with biases. is_told: their modules say so, and `peft` goes by that."""

    is_transposed: bool
    is_concatenated: bool
    has_bias: bool
    is_told: bool = True


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
        expert_layout: the same of those that don't say it, and of those whose files have them so.
        peft_half_converts: `peft` 0.21 turns weights of its single experts into fused ones, and not the configuration
            that belongs to them: it is missing in `_MODEL_TO_CONVERSION_PATTERN`, or found there under a type that has
            no experts.
        weighs_inputs: a row's weights are factors of what its experts get, not of what they give.
        routers: classes that choose them, with a weight of their own, which stays as it is.
        expert_gate: what the experts do between their two products, [N, 2I] to [N, I], gate and up side by side.
        routers_choose: a router gives logits, weights and experts. Otherwise the one who asks it chooses, by a stand-in
            that asks the pass context.
        expert_weights: the weights of a row's experts, whichever these are, from the router's logits: of the router,
            the logits [T, E] and the experts [T, K], float [T, K]. Of routers that choose; without it their routes
            can't be replayed.
        final_logits: what becomes of the logits after the head, from the text model's configuration.
        vision: how its models with vision look at pictures.
        stand_ins: by class, what makes a module that takes its place: of what hooks can't carry, such as what
            computes with other rows or with positions. Its linear layers, experts and routers are those of the pass
            already; its other weights stay as they are.
        loads_as: the `model_type` of the architecture in transformers, where the directories of this family say
            another. Nothing else is used of such a family: a loaded model is one of the other.
    """

    title: str
    model_types: tuple[str, ...]
    norms: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    expert_layout: ExpertLayout | None = None
    peft_half_converts: bool = False
    weighs_inputs: bool = False
    expert_gate: Callable[[nn.Module, bool], Gate] = silu_gate
    routers_choose: bool = True
    expert_weights: Weigh | None = None
    final_logits: Callable[[PretrainedConfig], FinalLogits] = as_they_are
    vision: VisionKind | None = None
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)
    loads_as: str | None = None
