"""Llama 4's tiles have the numbers of `transformers`' own processor, to the bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tests.paint import painted
from tinsmith.errors import UnsupportedError
from tinsmith.model.vision.tiles import Tiles
from tinsmith.pictures import LLAMA4, VisionInfo, placeholders

# of `Llama4ImageProcessor(size={"height": side, "width": side}, max_patches=most, resize_to_max_canvas=is_max)` in
# transformers 5.23 with torchvision 0.28, called with `painted(*size)`: the beginning of the SHA-256 of its pixels,
# float32; 184 random sizes of four such processors were the same to the bit
REAL = [
    (16, 4, False, (40, 24), 5, "dd6c9e24bc3f40a0"),
    (16, 4, False, (7, 5), 1, "5739b0ef2d6a5435"),
    (28, 9, True, (61, 130), 9, "bbbae2c405a07e65"),
    (28, 16, False, (333, 71), 17, "d268941608d2649d"),
    (56, 16, False, (300, 500), 16, "98de65ed2cdee42d"),
]
AS_THERE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # torch rounds bytes otherwise elsewhere


@pytest.mark.parametrize(("side", "most", "is_max", "size", "num_tiles", "digest"), REAL)
def test_pixels_are_those_of_transformers(
    side: int, most: int, is_max: bool, size: tuple[int, int], num_tiles: int, digest: str
) -> None:
    vision = VisionInfo(LLAMA4, 1, side=side, max_tiles=most, is_max_canvas=is_max, patch_size=4, merge_size=2)
    pixels = Tiles(vision)(images=[painted(*size)])["pixel_values"]
    assert pixels.shape == (num_tiles, 3, side, side)
    assert pixels.dtype == torch.float32
    if AS_THERE:
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] == digest
    assert (placeholders(vision, *size) == 1).sum() == num_tiles * ((side // 4) ** 2 // 4)


def test_a_tile_shows_its_part_and_the_last_one_all() -> None:
    """Where nothing is resized."""
    vision = VisionInfo(LLAMA4, 1, side=16, max_tiles=4)
    image = painted(32, 32)
    tiles = Tiles(vision)(images=[image])["pixel_values"]
    whole = (torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.bfloat16) * (1 / 255) - 0.5) / 0.5
    for number in range(4):
        row, column = divmod(number, 2)
        part = whole[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert torch.equal(tiles[number], part.float())
    assert len(tiles) == 5


def test_another_filter_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="resamples by Pillow's filter 1"):
        Tiles(VisionInfo(LLAMA4, 1, side=16, max_tiles=4, resample=1))
