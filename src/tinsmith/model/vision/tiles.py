"""Llama 4's image processor: a picture on a canvas of tiles, and the whole of it in one more.

`transformers` has it on torchvision alone, which isn't needed for anything else here: this gives the same numbers, to
the bit, by the operations of torch that torchvision calls (`tests/families/test_tiles.py`). A size is computed in
float32 where a side is bound by the canvas and in float64 where it isn't, and pixels in bfloat16, both as there.
Shape letters: N tiles, C channels, H height, W width, S side of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from tinsmith.errors import UnsupportedError
from tinsmith.model.vision.kind import Pixels
from tinsmith.pictures import VisionInfo, canvas

MODES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
RESCALE = 1 / 255


class Tiles:
    """Called as an image processor of `transformers` is."""

    def __init__(self, vision: VisionInfo) -> None:
        """
        Raises:
            UnsupportedError: pictures are to be resampled in another way.
        """
        if vision.resample not in MODES:
            raise UnsupportedError(
                f"the image processor resamples by Pillow's filter {vision.resample}: 2 or 3 is served"
            )
        self._vision = vision
        self._mode = MODES[vision.resample]

    def __call__(self, images: Sequence[Image], return_tensors: str = "pt") -> Pixels:
        """`pixel_values` [N, C, S, S], float32: of each picture its tiles row by row, and the whole if it has several.

        Args:
            return_tensors: torch's, whatever it says.
        """
        return {"pixel_values": torch.cat([self._tiles(image) for image in images])}

    def _tiles(self, image: Image) -> Tensor:
        vision, side = self._vision, self._vision.side
        pixels_1CHW = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].contiguous()
        rows, columns = canvas(vision, image.width, image.height)
        height, width = self._fitted((image.height, image.width), (rows * side, columns * side))
        small_1CHW = self._resized(pixels_1CHW, height, width)
        whole_1CHW = F.pad(small_1CHW, (0, columns * side - width, 0, rows * side - height))
        cut = self._normalised(whole_1CHW).view(3, rows, side, columns, side)
        tiles_NCSS = cut.permute(1, 3, 0, 2, 4).flatten(0, 1)
        if rows * columns == 1:
            return tiles_NCSS.float()
        return torch.cat([tiles_NCSS, self._normalised(self._resized(pixels_1CHW, side, side))]).float()

    def _fitted(self, size: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
        """Height and width within the canvas, of the same aspect; never larger than the picture or a tile's side
        (`get_max_res_without_distortion`)."""
        bounds: list[int] = []
        scales: list[Any] = []
        for own, largest in zip(size, most, strict=True):
            wanted = max(own, self._vision.side)
            is_bound = self._vision.is_max_canvas or largest < wanted
            bounds.append(largest if is_bound else wanted)
            scales.append(np.float32(largest) / np.float32(own) if is_bound else wanted / own)
        if scales[1] < scales[0]:
            height, width = min(_floor(size[0], scales[1]), bounds[0]), bounds[1]
        else:
            height, width = bounds[0], min(_floor(size[1], scales[0]), bounds[1])
        return max(height, 1), max(width, 1)

    def _resized(self, pixels_1CHW: Tensor, height: int, width: int) -> Tensor:
        if pixels_1CHW.shape[-2:] == (height, width):
            return pixels_1CHW
        return F.interpolate(pixels_1CHW, size=(height, width), mode=self._mode, align_corners=False, antialias=True)

    def _normalised(self, pixels_1CHW: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(each, dtype=torch.bfloat16)[:, None, None] for each in (self._vision.mean, self._vision.std)
        )
        return (pixels_1CHW.to(torch.bfloat16) * RESCALE).sub_(mean).div_(std)


def _floor(size: int, scale: Any) -> int:
    """In the scale's own precision."""
    return math.floor(np.float32(size) * scale if isinstance(scale, np.float32) else size * scale)
