"""Pictures among the tokens of a sequence: what one is, and how many tokens a model makes of it.

Counts as the models' own processors in `transformers` do, from a picture's width and height alone; looks at no pixel,
reads no file, knows neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

QWEN3_VL, QWEN3_VL_MOE, GEMMA3, LLAMA4 = "qwen3_vl", "qwen3_vl_moe", "gemma3", "llama4"
SHOWN = (QWEN3_VL, QWEN3_VL_MOE, GEMMA3, LLAMA4)  # kinds that the engine can show pictures to
MAX_ASPECT = 200  # of Qwen's smart_resize

Tokens: TypeAlias = npt.NDArray[np.int32]


class PictureSizeError(ValueError):
    """A width and height that the model's processor refuses; the message says why."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture among tokens: positions start..start+num_tokens-1 hold the model's placeholder tokens.

    data: the file as it was sent, PNG or JPEG, of width x height pixels once it is upright. digest: SHA-256 of `data`.
    """

    start: int
    num_tokens: int
    data: bytes = field(repr=False)
    width: int
    height: int
    digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(self.data).digest())

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


def tokens_of(pictures: Iterable[Picture]) -> int:
    """Of all of them together."""
    return sum(picture.num_tokens for picture in pictures)


@dataclass(frozen=True, slots=True)
class VisionInfo:
    """What of a model's config.json and preprocessor_config.json decides sizes and placeholders; sizes in pixels.

    kind: the model_type of the whole model, one of the four above. Every `image_token` among the placeholders stands
    for one embedding of the picture; the other placeholders are ordinary tokens. What is 0 has no meaning for the kind.

    An image chunk stands for what lies between the model's begin and end of an image; those two are text.
    chat_text: what the model's chat template writes for a picture. expansion: the text to put in its place before it is
    tokenized, with one `image_token` where the placeholders go. Empty: the tokenizer doesn't know them.
    mean, std: of each channel, after pixels were scaled to 0..1. resample: Pillow's number of the filter.
    """

    kind: str
    image_token: int
    chat_text: str = ""
    expansion: str = ""
    patch_size: int = 0
    merge_size: int = 1  # patches each way that become one embedding
    temporal_patch_size: int = 1  # frames of one patch; a picture is repeated so often
    min_pixels: int = 0  # qwen: of the resized picture
    max_pixels: int = 0
    tokens_per_image: int = 0  # gemma3
    side: int = 0  # gemma3: the resized picture's, llama4: a tile's; both ways
    max_tiles: int = 0  # llama4, as the next four
    is_max_canvas: bool = False
    x_separator: int = 0
    y_separator: int = 0
    whole_token: int = 0  # before the tile that shows the whole picture
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = 2


def placeholders(vision: VisionInfo, width: int, height: int) -> Tokens:
    """The tokens that stand for a picture of width x height pixels, int32, as the model's processor lays them out.

    Raises:
        PictureSizeError: the processor takes no picture of that shape.
    """
    if vision.kind in (QWEN3_VL, QWEN3_VL_MOE):
        resized_height, resized_width = smart_resize(vision, width, height)
        factor = vision.patch_size * vision.merge_size
        count = (resized_height // factor) * (resized_width // factor)
        return np.full(count, vision.image_token, np.int32)
    if vision.kind == GEMMA3:
        return np.full(vision.tokens_per_image, vision.image_token, np.int32)
    return np.fromiter(_tiled(vision, *canvas(vision, width, height)), np.int32)


def smart_resize(vision: VisionInfo, width: int, height: int) -> tuple[int, int]:
    """Height and width that Qwen resizes a picture to: multiples of patch_size * merge_size, about the same aspect,
    min_pixels to max_pixels in all (`transformers`, image_processing_qwen2_vl.smart_resize).

    Raises:
        PictureSizeError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise PictureSizeError(f"one side of {width} x {height} pixels is more than {MAX_ASPECT} times the other")
    factor = vision.patch_size * vision.merge_size
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > vision.max_pixels:
        beta = math.sqrt(height * width / vision.max_pixels)
        new_height, new_width = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif new_height * new_width < vision.min_pixels:
        beta = math.sqrt(vision.min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return new_height, new_width


def canvas(vision: VisionInfo, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the tiles that Llama 4 cuts a picture into (`transformers`,
    image_processing_llama4.get_best_fit): the smallest canvas that needs no shrinking, else the one that shrinks least;
    of equal ones the one of least area. In float32, as there, since scales are compared for equality."""
    tiles = np.array(_canvases(vision.max_tiles), np.int64)
    sizes = (tiles * vision.side).astype(np.float32)
    scales = (sizes / np.array([height, width], np.float32)).min(axis=1)
    grown = scales[scales >= 1]
    scale = grown.min() if len(grown) and not vision.is_max_canvas else scales.max()
    chosen = tiles[scales == scale]
    rows, columns = chosen[int(chosen.prod(axis=1).argmin())]
    return int(rows), int(columns)


def _canvases(max_tiles: int) -> list[tuple[int, int]]:
    """Every rows x columns of at most max_tiles tiles, by aspect in the order of the processor's table."""
    by_aspect: dict[float, list[tuple[int, int]]] = {}
    for count in range(max_tiles, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                columns = count // rows
                by_aspect.setdefault(rows / columns, []).append((rows, columns))
    return [size for sizes in by_aspect.values() for size in sizes]


def _tiled(vision: VisionInfo, rows: int, columns: int) -> Iterator[int]:
    """Tile by tile with separators, if there is more than one, then the whole (`transformers`,
    processing_llama4._prompt_split_image, between its start and end of the image)."""
    patches = (vision.side // vision.patch_size) ** 2 // vision.merge_size**2
    if rows * columns > 1:
        for _ in range(rows):
            for column in range(columns):
                yield from [vision.image_token] * patches
                if column < columns - 1:
                    yield vision.x_separator
            yield vision.y_separator
    yield vision.whole_token
    yield from [vision.image_token] * patches
