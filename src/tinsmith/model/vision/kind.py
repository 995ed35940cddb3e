"""What a family with vision says of it (see `families`).

Shape letters: N features of a picture, D hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Pixels = Mapping[str, Any]  # what the image processor of a model gives for one picture


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What a model sees in one picture.

    features_ND: in the place of the placeholders' embeddings. deeper: [N, D] each, added to the same rows after the
    first layers, one a layer (DeepStack, arXiv 2406.04334).
    """

    features_ND: Tensor
    deeper: tuple[Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.features_ND, *self.deeper))


@dataclass(frozen=True, slots=True)
class VisionKind:
    """
    Args:
        model_types: `model_type` of config.json, of the whole model.
        towers: paths of the modules that pictures alone go through.
        look: what the whole model makes of the pixels of one picture.
        inputs: how the untouched model is called with one picture: tokens [1, T], which of them are the picture's
            [1, T] (int64, 0 or 1), and its pixels.
        has_axes: rotary positions count time, height and width apart, as Qwen's do.
        sees_whole: a token of a picture sees all of its picture.
    """

    model_types: tuple[str, ...]
    towers: tuple[str, ...]
    look: Callable[[nn.Module, Pixels], Sight]
    inputs: Callable[[Tensor, Tensor, Pixels], dict[str, Any]]
    has_axes: bool = False
    sees_whole: bool = False
