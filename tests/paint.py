"""Pictures for tests, and a base model's vision that makes few tokens of them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tinsmith.pictures import QWEN3_VL, VisionInfo

IMAGE_TOKEN = 90
VISION = VisionInfo(
    QWEN3_VL,
    IMAGE_TOKEN,
    chat_text="<|image_pad|>",
    expansion="<|image_pad|>",
    patch_size=8,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=256,
    max_pixels=4096,
)  # a token for each 16 x 16 pixels, at most 16 of them


def painted(width: int = 32, height: int = 32, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours, another picture for each seed."""
    x, y, c = (np.arange(count).astype(np.uint8) for count in (width, height, 4))  # of 8 bits, so modulo 256
    of_channel = np.uint8(37 * seed % 256) + 11 * c
    values = x[None, :, None] * (3 + c) + y[:, None, None] * (5 - c) + of_channel
    picture = Image.fromarray(values, "RGBA" if mode == "RGBA" else None)
    return picture.convert("RGBA") if mode == "RGBA" else picture.convert("RGB").convert(mode)


def png(width: int = 32, height: int = 32, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    return saved(painted(width, height, seed, mode), "PNG", **options)


def jpeg(width: int = 32, height: int = 32, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    return saved(painted(width, height, seed, mode), "JPEG", **options)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, pixels: bytes, *, depth: int = 8, colours: int = 2, extra: bytes = b"") -> bytes:
    """A PNG of these header fields around compressed `pixels`, whether or not they fit."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + extra + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
