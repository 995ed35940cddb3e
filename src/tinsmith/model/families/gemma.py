"""Gemma 2 and Gemma 3: windows in some layers; in Gemma 2 capped scores and capped logits. In Gemma 3 with vision the
tokens of a picture see all of it, also in the layers with windows (arXiv 2503.19786, section 2.1)."""

from typing import Any, cast

from torch import Tensor, nn
from transformers import PretrainedConfig

from tinsmith.model.families.family import Family
from tinsmith.model.final import FinalLogits
from tinsmith.model.vision.kind import Pixels, Sight, VisionKind


def final_logits(config: PretrainedConfig) -> FinalLogits:
    return FinalLogits(cap=getattr(config, "final_logit_softcapping", None))


def look(model: nn.Module, pixels: Pixels) -> Sight:
    found = cast(Any, model).get_image_features(pixels["pixel_values"], return_dict=True)
    return Sight(found.pooler_output.flatten(0, 1))


def inputs(tokens: Tensor, is_picture: Tensor, pixels: Pixels) -> dict[str, Any]:
    return {"input_ids": tokens, "token_type_ids": is_picture, "pixel_values": pixels["pixel_values"]}


VISION = VisionKind(
    model_types=("gemma3",),
    towers=("model.vision_tower", "model.multi_modal_projector"),
    look=look,
    inputs=inputs,
    sees_whole=True,
)

FAMILY = Family(title="Gemma 2 and 3", model_types=("gemma2", "gemma3_text"), final_logits=final_logits, vision=VISION)
