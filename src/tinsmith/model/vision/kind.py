"""What a family with vision says of it (see `families`).

Shape letters: N features of a picture, D hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinsmith.pictures import VisionInfo

Pixels = Mapping[str, Any]  # what the image processor of a model gives for one picture


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What a model sees in one picture, or in several end to end.

    features_ND: in the place of the placeholders' embeddings. deeper: [N, D] each, added to the same rows after the
    first layers, one a layer (DeepStack, arXiv 2406.04334).
    """

    features_ND: Tensor
    deeper: tuple[Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.features_ND, *self.deeper)

    def split(self, counts: Sequence[int]) -> list[Sight]:
        """One for each picture, whose features are so many: copies."""
        by_part = [[own.clone() for own in torch.split(part, list(counts))] for part in self.parts]
        return [Sight(features_ND, tuple(deeper)) for features_ND, *deeper in zip(*by_part, strict=True)]


@dataclass(frozen=True, slots=True)
class VisionKind:
    """
    Args:
        model_types: `model_type` of config.json, of the whole model.
        towers: paths of the modules that pictures alone go through.
        look: what the whole model makes of the pixels of one picture, or of several, each array of theirs joined.
        inputs: how the untouched model is called with one picture: tokens [1, T], which of them are the picture's
            [1, T] (int64, 0 or 1), and its pixels.
        has_axes: rotary positions count time, height and width apart, as Qwen's do.
        sees_whole: a token of a picture sees all of its picture.
        processor: takes the place of the directory's image processor, where that needs more than Pillow and numpy.
    """

    model_types: tuple[str, ...]
    towers: tuple[str, ...]
    look: Callable[[nn.Module, Pixels], Sight]
    inputs: Callable[[Tensor, Tensor, Pixels], dict[str, Any]]
    has_axes: bool = False
    sees_whole: bool = False
    processor: Callable[[VisionInfo], Callable[..., Pixels]] | None = None
