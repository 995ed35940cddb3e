"""Qwen3-VL, dense: Qwen3's layers with rotary positions on three axes, and features of pictures after the first ones.

What it makes of a picture, arXiv 2511.21631, section 2: rows and columns of patches, of which 2 x 2 become a token.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from tinsmith.model.families.family import Family
from tinsmith.model.vision.kind import Pixels, Sight, VisionKind


def look(model: nn.Module, pixels: Pixels) -> Sight:
    found = cast(Any, model).get_image_features(pixels["pixel_values"], pixels["image_grid_thw"], return_dict=True)
    return Sight(torch.cat(found.pooler_output), tuple(map(torch.cat, found.deepstack_features)))


def inputs(tokens: Tensor, is_picture: Tensor, pixels: Pixels) -> dict[str, Any]:
    return {"input_ids": tokens, "mm_token_type_ids": is_picture, **pixels}


VISION = VisionKind(
    model_types=("qwen3_vl", "qwen3_vl_moe"), towers=("model.visual",), look=look, inputs=inputs, has_axes=True
)

FAMILY = Family(
    title="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_text"),
    norms=("Qwen3VLTextRMSNorm",),
    mlps=("Qwen3VLTextMLP",),
    attentions=("Qwen3VLTextAttention",),
    vision=VISION,
)
