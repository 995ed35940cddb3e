"""What a family of models needs beyond the common path: the shape of the files in this folder.

The common path hooks every nn.Linear of attention and MLP and transformers' attention interface, and checks at start
that the opened model still gives its own logits. A family whose parts are all of that kind is served without a file
here; a file makes it faster, by naming modules whose code was read and is known, or says what hooks can't see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from tinsmith.model.final import FinalLogits


def as_they_are(config: PretrainedConfig) -> FinalLogits:
    return FinalLogits()


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
        final_logits: what becomes of the logits after the head, from the text model's configuration.
    """

    title: str
    model_types: tuple[str, ...]
    norms: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    final_logits: Callable[[PretrainedConfig], FinalLogits] = as_they_are
