"""Files of pictures as bytes: whatever is read of them is bounded, and what is called whole can be shown to a model."""

from __future__ import annotations

from tests.paint import jpeg, png, raw_png
from tinsmith.validate.picture_files import Bounds, check_whole, read_rgb, shape_of

BOUNDS = Bounds(1 << 20, 1 << 18)
SEEDS = (
    png(24, 16),
    png(16, 24, mode="P"),
    png(9, 9, mode="LA"),
    raw_png(8, 8, b"\0" * 25 * 8),
    jpeg(24, 16),
    jpeg(24, 16, progressive=True),
    jpeg(16, 16, mode="L"),
)
WORDS = (b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"eXIf", b"iCCP", b"zTXt", b"Exif\0\0II*\0",
         b"\xff\xc0", b"\xff\xc2", b"\xff\xda", b"\xff\xe1", b"\xff\xe2MPF\0", b"\xff\xff\xff\xff")  # fmt: skip


def pictures(data: bytes) -> None:
    """Raises: ValueError: its header tells of another size than its pixels have."""
    shape = shape_of(data, BOUNDS)
    check_whole(data, BOUNDS)
    size = read_rgb(data, BOUNDS).size
    if size != (shape.width, shape.height):
        raise ValueError(f"{size} pixels of a picture of {shape}")
